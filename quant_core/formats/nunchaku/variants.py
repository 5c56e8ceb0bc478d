"""The two variants of nunchaku's W4A4 layers, of which a file is one: what they are on the operator, and what
a header says of them.

NVFP4 (`SVDQW4A4Linear` with precision "nvfp4", deepcompressor's examples/diffusion/configs/svdquant/
nvfp4.yaml) has e2m1 codes and an e4m3 scale each 16 in-channels. Its activations have neither a shift behind
GELU nor a level above the e4m3 scales: nunchaku divides by min(absmax / 6, 448) of 16 channels and multiplies
by that number rounded to e4m3 (`quantize_w4a4_fp4_from_fpsum_warp` in gemm_w4a4.cuh), so that a group below
6 * 2^-10 is all zeros. Here each token has an fp32 scale above them (`nvfp4.token_scale`), by which e4m3 has
its whole range, and codes are rounded at the scale that they are multiplied by. The weights are nunchaku's
own bit for bit.
"""

from dataclasses import dataclass

from ....kernels.operator import nvfp4
from ....kernels.operator.codes import INT, NVFP4, ActivationSpec, WeightSpec
from ....kernels.operator.spec import GELU_SHIFT, LinearSpec
from . import layout


@dataclass(frozen=True)
class Variant:
    """title: for reports. grid, group: of weights and activations. dtype: of the codes in a header.
    micro: safetensors' dtypes of wscales. weight_scales, activation_scales: what a header has as their
    scale_dtype, level by level, none where they are 16 bit."""

    title: str
    grid: str
    group: int
    dtype: str
    micro: tuple[str, ...]
    weight_scales: tuple[str | None, ...] = ()
    activation_scales: str | None = None

    @property
    def weight(self) -> WeightSpec:
        return WeightSpec(group=self.group, grid=self.grid)

    def activation(self, after_gelu: bool) -> ActivationSpec:
        """after_gelu: whether nunchaku shifts these activations where it has codes without a sign."""
        unsigned = after_gelu and self.grid == INT
        return ActivationSpec(
            group=self.group, unsigned=unsigned, shift=GELU_SHIFT if unsigned else 0.0, grid=self.grid
        )

    def header(self, rank: int) -> dict:
        """The entry quantization_config, as `nunchaku.merge_safetensors` makes it. rank: of all layers."""
        codes = {"dtype": self.dtype, "group_size": self.group}
        return {
            "method": "svdquant",
            "weight": codes | {"scale_dtype": list(self.weight_scales) or None},
            "activation": codes | {"scale_dtype": self.activation_scales},
            "rank": rank,
        }


INT4 = Variant("INT4", INT, layout.GROUP, "int4", ("BF16", "F16"))
FP4 = Variant(
    "NVFP4",
    NVFP4,
    nvfp4.GROUP,
    "fp4_e2m1_all",
    ("F8_E4M3",),
    (None, "fp8_e4m3_nan"),
    "fp8_e4m3_nan",
)
VARIANTS = (INT4, FP4)


class UnknownVariant(ValueError):
    """A header that describes neither; says which entry of `weight`, what is expected and what it has."""


def declared(weight: dict) -> Variant:
    """The variant that quantization_config.weight of a header describes. Raises UnknownVariant."""
    dtype = weight.get("dtype")
    found = next((v for v in VARIANTS if v.dtype == dtype), None)
    if found is None:
        known = " or ".join(repr(v.dtype) for v in VARIANTS)
        raise UnknownVariant(f"quantization_config.weight.dtype: expected {known}, found {dtype!r:.80}")
    group, scales = weight.get("group_size", found.group), weight.get("scale_dtype")
    if group != found.group:
        raise UnknownVariant(
            f"quantization_config.weight.group_size: expected {found.group} with {dtype!r}, found "
            f"{group!r:.80}"
        )
    levels = scales if isinstance(scales, list) else [scales]
    # deepcompressor's own name of the type is sfp8_e4m3_nan.
    names = [level.removeprefix("s") if isinstance(level, str) else level for level in levels]
    if found.grid == NVFP4 and not all(name in (None, *found.weight_scales) for name in names):
        wanted = list(found.weight_scales)
        raise UnknownVariant(
            f"quantization_config.weight.scale_dtype: expected {wanted} with {dtype!r}, found {scales!r:.80}"
        )
    return found


def variant_of(specs: list[LinearSpec]) -> Variant:
    """The variant that most of these layers are of, those with quantized activations counted; INT4 of
    equals."""
    w4a4 = [spec for spec in specs if not spec.weight_only]
    return FP4 if 2 * sum(spec.grid == NVFP4 for spec in w4a4) > len(w4a4) else INT4
