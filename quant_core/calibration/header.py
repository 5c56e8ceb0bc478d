"""What the header of a statistics file says, taken as untrusted: types, ranges, and the tensors that there
have to be."""

from dataclasses import fields

from ..store.own_json import DEPTH, NotOurs, field, parse, short
from ..store.safe import SafeFile
from .trajectory import CALLS, Call, names_in

VERSION = 1
_MOST = 2**53  # tokens that an input may have seen: JSON's largest whole number


def checked(text: str) -> dict:
    """The header, with all that is read of it later in place. Raises NotOurs naming the field and what was
    expected there."""
    meta = parse(text)
    if (version := field(meta, "version", int, 0)) != VERSION:
        raise NotOurs(f"version {version}, this pack reads version {VERSION}")
    field(meta, "model", str)
    for name in ("samples", "passes"):
        field(meta, name, int, 1)
    if field(meta, "done", int, 0) > meta["samples"]:
        raise NotOurs(f"done: {meta['done']} of {meta['samples']} samples")
    field(meta, "seed", int)
    for name in field(meta, "inputs", dict):
        try:
            _check_input(field(meta["inputs"], name, dict))
        except NotOurs as error:
            raise NotOurs(f"input {name}: {error}") from error
    for index, call in enumerate(field(meta, "trajectory", list) if "trajectory" in meta else ()):
        try:
            _check_call(call)
        except NotOurs as error:
            raise NotOurs(f"trajectory, call {index}: {error}") from error
    if "observed" in meta:
        _check_observed(field(meta, "observed", dict))
    return meta


def _check_input(info):
    width = field(info, "width", int, 1)
    field(info, "reservoir", int, 0)
    if not 0 <= field(info, "count", int) < _MOST:
        raise NotOurs(f"count: expected a number of tokens, found {short(info['count'])}")
    edge = 0
    for block in field(info, "blocks", list):
        if not (
            isinstance(block, list)
            and [type(at) for at in block] == [int, int]
            and block[0] == edge < block[1] <= width
        ):
            raise NotOurs(
                f"blocks: expected a range of channels from {edge} to at most {width}, found {short(block)}"
            )
        edge = block[1]
    if info["blocks"] and edge != width:
        raise NotOurs(f"blocks: expected ranges up to channel {width}, found the last end at {edge}")


def _check_call(call):
    if not isinstance(call, dict) or set(call) != {f.name for f in fields(Call)}:
        raise NotOurs(f"expected an object of {', '.join(f.name for f in fields(Call))}, found {short(call)}")
    for name in ("sample", "step"):
        field(call, name, int, 0)
    field(call, "timestep", (int, float))
    field(call, "key", (int, float), 0)
    field(call, "held_out", bool)
    for name, kind in (("args", list), ("kwargs", dict)):
        _check_argument(field(field(call, "arguments", dict), name, kind))


def _check_argument(value, depth=0):
    """As `trajectory` records it: {"tensor": name} where a tensor stands, other dicts in {"dict": ...}.
    kwargs are a plain one."""
    if depth > DEPTH:
        raise NotOurs("arguments: nested too deep")
    if isinstance(value, dict) and "tensor" in value:
        field(value, "tensor", str)
    elif isinstance(value, dict):
        inner = field(value, "dict", dict) if "dict" in value else value
        for v in inner.values():
            _check_argument(v, depth + 1)
    elif isinstance(value, list):
        for v in value:
            _check_argument(v, depth + 1)


def _check_observed(seen):
    order, shared, rows = field(seen, "order", list), field(seen, "shared", dict), field(seen, "rows", dict)
    if not all(isinstance(name, str) for name in [*order, *shared.values()]):
        raise NotOurs("observed: expected names of layers in 'order' and 'shared'")
    for name in rows:
        field(rows, name, int, 0)
    if set(rows) != set(order):
        raise NotOurs(f"observed: 'rows' and 'order' differ in {short(next(iter(set(rows) ^ set(order))))}")


def require_tensors(file: SafeFile, meta: dict):
    """Raises NotOurs naming a tensor that the header asks for and that is missing, or has another dtype or
    shape: nothing is read for it."""
    keys, recorded = set(file.keys()), set()
    for name, info in meta["inputs"].items():
        for leaf, (dtype, shape) in _leaves(info).items():
            found = _stored(file, keys, f"{name}|{leaf}")
            if (
                found[0] != dtype
                or len(found[1]) != len(shape)
                or any(b not in (None, a) for a, b in zip(found[1], shape, strict=True))
            ):
                wanted = f"{dtype} {['any' if s is None else s for s in shape]}"
                raise NotOurs(f"{name}|{leaf}: expected {wanted}, found {found[0]} {list(found[1][:6])}")
        rows = {_stored(file, keys, f"{name}|{leaf}")[1][0] for leaf in ("tokens", "keys", "timesteps")}
        if len(rows) > 1 or max(rows) > info["reservoir"]:
            raise NotOurs(
                f"input {name}: {sorted(rows)} held-out tokens, keys and timesteps, expected as many of "
                f"each, up to {info['reservoir']}"
            )
    if len(meta.get("trajectory", ())) > CALLS:
        raise NotOurs(f"trajectory: {len(meta['trajectory'])} calls, expected at most {CALLS}")
    for call in meta.get("trajectory", ()):
        recorded |= set(names_in(call["arguments"]))
    for name in sorted(recorded):
        _stored(file, keys, f"trajectory|{name}")


def _stored(file, keys, key):
    if key not in keys:
        raise NotOurs(f"the tensor {key} is missing")
    view = file.get_slice(key)
    return view.get_dtype(), tuple(view.get_shape())


def _leaves(info) -> dict:
    """{leaf: (dtype, shape)} of an input's tensors; None: any size."""
    width = info["width"]
    blocks = info["blocks"] if info["count"] else ()
    return {
        "absmax": ("F32", (width,)),
        "tokens": ("BF16", (None, width)),
        "keys": ("F64", (None,)),
        "timesteps": ("F32", (None,)),
    } | {f"hessian.{a}": ("F32", (b - a, b - a)) for a, b in blocks}
