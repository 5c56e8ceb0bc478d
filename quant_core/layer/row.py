"""One layer in a report of what quantization cost."""

from dataclasses import asdict, dataclass, field

from ..families import Layer
from ..store.own_json import WHOLE, NotOurs, short
from ..store.own_json import field as checked


@dataclass
class Row:
    """One layer. what: its spec in short, or "16 bit"; sqnr_db: of its output on held-out tokens, None if not
    measured. block: empty for what was never to be quantized (`run.unquantized.kept_rows`)."""

    name: str
    block: str
    in_features: int
    out_features: int
    what: str
    sqnr_db: float | None = None
    nbytes: int = 0
    seconds: float = 0.0
    choices: dict = field(default_factory=dict)
    note: str = ""

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def quantized(self) -> bool:
        return self.nbytes > 0

    @classmethod
    def in_16_bit(cls, layer: Layer, why: str) -> "Row":
        """Of a layer that stays as it is."""
        return cls(layer.name, layer.block, layer.in_features, layer.out_features, "16 bit", note=why)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> "Row":
        """Of a row in a file; fields that this version does not know are left out. Raises NotOurs naming the
        layer and the field."""
        if not isinstance(data, dict):
            raise NotOurs(f"expected an object, found {short(data)}")
        try:
            row = cls(
                **{
                    name: checked(data, name, kind)
                    for name, kind in _KINDS.items()
                    if name in data or name in _REQUIRED
                }
            )
            for name in ("in_features", "out_features"):
                checked(data, name, int, 1)
            _check_numbers(row)
        except NotOurs as error:
            raise NotOurs(f"layer {data.get('name', '')!s:.200}: {error}") from error
        return row


_REQUIRED = ("name", "block", "in_features", "out_features", "what")
_KINDS: dict[str, type | tuple] = {
    "name": str,
    "block": str,
    "in_features": int,
    "out_features": int,
    "what": str,
    "sqnr_db": (int, float, type(None)),
    "nbytes": int,
    "seconds": (int, float),
    "choices": dict,
    "note": str,
}


def _check_numbers(row):
    if not 0 <= row.nbytes < 2**62:
        raise NotOurs(f"nbytes: expected a number of bytes, found {short(row.nbytes)}")
    for name in ("sqnr_db", "seconds"):  # any float: no error at all is inf dB
        value = getattr(row, name)
        if isinstance(value, int) and abs(value) >= WHOLE:
            raise NotOurs(f"{name}: expected a number, found {short(value)}")
