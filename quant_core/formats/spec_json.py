"""A LinearSpec as JSON, as it stands in the header of a Nibble file: anybody may have changed it since."""

from dataclasses import asdict, fields

from ...kernels.operator.codes import INT
from ...kernels.operator.errors import shortened
from ...kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, SpecError, WeightSpec

WHOLE = 2**31  # sizes are below
_LATER: dict[type, dict] = {
    ActivationSpec: {
        "clip": 1.0,
        "grid": INT,
        "either": False,
        "outer": "token",
        "fixed": 0.0,
    },
    WeightSpec: {"grid": INT},
    PartSpec: {"kronecker": (), "per_slice": False, "principal": 0},
    LinearSpec: {"order": False, "padding": 0, "spatial": 0},
}  # fields that older files do not have
_TYPES = {"bool": bool, "int": int, "float": (int, float), "str": str}


def to_json(spec: LinearSpec) -> dict:
    """Without the fields of learned transforms, principal components, order, padding, convolutions, grids
    and outer scales of a tensor where there are none, as versions before 0.3 wrote it."""
    data = asdict(spec)
    for name in ("order", "padding", "spatial"):
        if not data[name]:
            del data[name]
    for part in data["parts"]:
        if not part["kronecker"]:
            del part["kronecker"], part["per_slice"]
        if not part["principal"]:
            del part["principal"]
        for codes in (part["weight"], part["activation"]):
            if codes is not None and codes["grid"] == INT:
                del codes["grid"]
                codes.pop("either", None)
            if codes is not None and codes.get("outer") == "token":
                del codes["outer"], codes["fixed"]
    return data


def from_json(data: object) -> LinearSpec:
    """Raises SpecError for unknown or missing fields, wrong types and contradictions.

    Example: `from_json(to_json(spec)) == spec`.
    """
    found = _fields(LinearSpec, data)
    if not isinstance(found["parts"], (list, tuple)):
        raise SpecError("parts must be a list")
    return LinearSpec(**found | {"parts": tuple(_part(raw) for raw in found["parts"])})


def _part(data) -> PartSpec:
    found = _fields(PartSpec, data)
    sizes = tuple(found["kronecker"]) if isinstance(found["kronecker"], (list, tuple)) else (None,)
    if not all(type(k) is int and 0 < k < WHOLE for k in sizes):
        raise SpecError(f"kronecker must be a list of sizes, found {_short(sizes)}")
    weight = WeightSpec(**_fields(WeightSpec, found["weight"]))
    activation = found["activation"]
    if activation is not None:
        activation = ActivationSpec(**_fields(ActivationSpec, activation))
    return PartSpec(**found | {"kronecker": sizes, "weight": weight, "activation": activation})


def _fields(cls, data) -> dict:
    """The fields of a record in a file, each with the type that `cls` gives it."""
    if not isinstance(data, dict):
        raise SpecError(f"{cls.__name__}: expected an object, found {type(data).__name__}")
    data = _LATER.get(cls, {}) | data
    names = {f.name: f for f in fields(cls)}
    if set(data) != set(names):
        raise SpecError(f"{cls.__name__}: expected the fields {sorted(names)}, found {_short(sorted(data))}")
    for name, f in names.items():
        kind = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", "")
        if kind in _TYPES:
            _require(f"{cls.__name__}.{name}", kind, data[name])
    return dict(data)


def _require(name, kind, value):
    if not isinstance(value, _TYPES[kind]) or (kind != "bool" and isinstance(value, bool)):
        raise SpecError(f"{name}: expected {kind}, found {_short(value)}")
    if kind == "int" and not -WHOLE < value < WHOLE:
        raise SpecError(f"{name}: {_short(value)} is out of range")
    if kind == "float" and not abs(value) < WHOLE:
        raise SpecError(f"{name}: expected a finite number, found {_short(value)}")


def _short(value) -> str:
    return shortened(repr(value), 400)
