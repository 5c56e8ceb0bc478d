"""The kernels that a layer takes on a card, as they are given to the compiler."""

from dataclasses import dataclass, replace

import torch

from .....kernels import tuning
from .....kernels.operator.spec import LinearSpec, PartSpec
from .....kernels.plan import FP4, lower
from .....kernels.target import Target
from .....kernels.tuning import Problem, Tile
from ..cases import quantizers

KERNELS = "comfyui_nibble.kernels"
GEMM = (
    dict.fromkeys(("x_ptr", "w_ptr"), "i8*")
    | {"sx_ptr": "fp32*", "ends": ("i32",) * 8, "M": "i32", "R": "i32", "ld_sx": "i32"}
    | dict.fromkeys(("sw_ptr", "low_ptr", "up_ptr", "bias_ptr", "y_ptr"), "bf16*")
    | dict.fromkeys(("N", "KB", "ldx", "ldw", "ldy", "ld_sw", "ld_low", "ld_up", "plane"), "i32:16")
)
RANK = {"R": "i32:16"}  # where Triton may specialise by it
TURING_GEMM = (
    dict.fromkeys(("x_ptr", "w_ptr"), "i32*")
    | dict.fromkeys(("sw_ptr", "bias_ptr", "y_ptr"), "fp16*")
    | {"sx_ptr": "fp32*"}
    | {k: GEMM[k] for k in ("ends", "M", "N", "KB", "ldx", "ldw", "ldy", "ld_sx", "ld_sw")}
)
QUANTIZER = (
    {"q_ptr": "i8*", "s_ptr": "fp32*", "M": "i32", "tokens": "i32", "shift": "fp32", "clip": "fp32"}
    | {"eps": "fp32"}
    | dict.fromkeys(("x_ptr", "smooth_ptr", "down_ptr", "mod_scale_ptr", "mod_shift_ptr", "low_ptr"), "bf16*")
    | dict.fromkeys(("K", "width", "R", "ldx", "ldq", "plane", "ld_down", "ld_low", "ld_mod"), "i32:16")
    | {"principal": "i32"}
)
FP4_GEMM = (
    dict.fromkeys(("x_ptr", "w_ptr", "sx_ptr", "sw_ptr"), "u8*")
    | dict.fromkeys(("tx_ptr", "tw_ptr"), "fp32*")
    | dict.fromkeys(("low_ptr", "up_ptr", "bias_ptr", "y_ptr"), "bf16*")
    | {"M": "i32", "step_tw": "i32"}
    | dict.fromkeys(("N", "KB", "R", "ldx", "ldw", "ld_sx", "ld_sw", "ldy", "ld_low", "ld_up"), "i32:16")
)
FP4_QUANTIZER = {k: v for k, v in QUANTIZER.items() if k not in ("width", "plane", "shift", "clip")} | {
    "given_ptr": "fp32*",
    "t_ptr": "fp32*",
    "s_ptr": "u8*",
    "lds": "i32:16",
}


@dataclass(frozen=True)
class Compilation:
    """What `machine_code.built` takes."""

    module: str
    kernel: str
    signature: dict
    constants: dict
    arch: int | str
    options: dict

    def with_pointers(self, dtype: str, *names: str) -> "Compilation":
        """The same with these pointers, or all that are bf16, to another dtype."""
        chosen = names or [k for k, v in self.signature.items() if v == "bf16*"]
        return replace(self, signature=self.signature | dict.fromkeys(chosen, f"{dtype}*"))

    @property
    def arguments(self) -> tuple:
        """Of `machine_code.built`; they survive the way into another process."""
        return self.module, self.kernel, self.signature, self.constants, self.arch, self.options


def problem_of(target: Target, spec: LinearSpec, tokens: int) -> Problem:
    """What the first launch of a layer looks up."""
    step = lower(spec, target)[0]
    return Problem(
        step.kernel,
        step.planes,
        step.scales,
        step.swap,
        tokens,
        spec.out_features,
        step.row_bytes,
        step.block,
    )


def product(
    target: Target,
    problem: Problem,
    tile: Tile,
    rank: int = 32,
    has_bias: bool = True,
    accumulate: bool = False,
    exact: bool = True,
) -> Compilation:
    """The product's kernel with this tile; rank 0 for none."""
    if problem.kernel == FP4:
        return _fp4_product(target, problem, tile, rank, has_bias, accumulate)
    from .....kernels.quant_linear import launch

    arch, warps, flags = target.arch, {"num_warps": tile.warps}, (has_bias, accumulate)
    module = f"{KERNELS}.quant_linear"
    if problem.kernel.startswith("turing"):
        made = launch.turing_constants(problem, tile, exact, *flags)
        return Compilation(f"{module}.turing", "gemm_m8n8k32", TURING_GEMM, made, arch, warps)
    if tile.gluon and target.card.int4:
        made = launch.ampere_constants(problem, tile, exact, rank, *flags)
        name = problem.kernel.replace("gemm", "ampere")
        return Compilation(f"{module}.ampere", name, GEMM | RANK, made, arch, warps)
    if tile.gluon:
        from .....kernels.quant_linear.hopper import tile_layout

        layout = tile_layout(tile.bk)
        described = {
            name: f"tensordesc<i8[{rows}, {tile.bk}],{layout!r}>"
            for name, rows in (("x_desc", tile.bm), ("w_desc", tile.bn))
        }
        made = launch.hopper_constants(problem, tile, rank, *flags)
        return Compilation(f"{module}.hopper", "gemm_wgmma", GEMM | RANK | described, made, arch, warps)
    made = launch.constants(target, problem, tile, exact, rank, *flags)
    options = warps | {"num_stages": tile.stages}
    return Compilation(f"{module}.triton", problem.kernel, GEMM, made, arch, options)


def _fp4_product(target, problem, tile, rank, has_bias, accumulate):
    from .....kernels.fp4.launch import constants

    made = constants(target, tile, 16, problem.row_bytes, rank, True, has_bias, accumulate)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Compilation(f"{KERNELS}.fp4.triton", "gemm_fp4_kernel", FP4_GEMM, made, target.arch, options)


def tile_of(target: Target, problem: Problem) -> Tile:
    """The default tile of a product."""
    if problem.kernel == FP4:
        from .....kernels.fp4.launch import gemm_tile

        return gemm_tile(target, problem.tokens)
    return tuning.candidates(target, problem)[0]


def quantizer(target: Target, rank: int, rotation: int, *settings) -> Compilation:
    """The activation quantizer; settings: prologue, smooth, grouped, bits, unsigned, planes, as in
    `quant_activation.launch.constants`."""
    from .....kernels.quant_activation.launch import constants

    dtype = torch.bfloat16 if torch.bfloat16 in target.dtypes else torch.float16
    rank = rank if rank <= tuning.low_rank_limit(target, rotation) else 0
    tile = tuning.quantizer_tile(target, rank, rotation)
    made = constants(target, tile, dtype, rank, rotation, *settings)
    # Triton's dtypes do not survive the way into another process.
    made["ROT_DTYPE"] = "tl.bfloat16" if str(made["ROT_DTYPE"]) == "bf16" else "tl.float16"
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    name = f"{KERNELS}.quant_activation.triton"
    found = Compilation(name, "quantize_kernel", QUANTIZER, made, target.arch, options)
    return found if dtype == torch.bfloat16 else found.with_pointers("fp16")


def fp4_quantizer(target: Target, *settings) -> Compilation:
    """The quantizer of fp4; settings: level, block, either, rank, rotation, prologue, smooth, principal, as
    in `fp4.launch.quantizer_constants`."""
    from .....kernels.fp4.launch import quantizer_constants, quantizer_tile

    tile = quantizer_tile(settings[3], settings[4])
    made = quantizer_constants(target, tile, torch.bfloat16, *settings)
    made["ROT_DTYPE"] = "tl.bfloat16"
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    name = f"{KERNELS}.fp4.triton"
    return Compilation(name, "quantize_fp4_kernel", FP4_QUANTIZER, made, target.arch, options)


def spec_of(grain: str, n: int, k: int, rank: int) -> LinearSpec:
    """SVDQuant's layer at a grain of `cases.quantizers`: smoothed, with a low rank and a bias."""
    weight, act = quantizers(grain)
    return LinearSpec(k, n, (PartSpec(0, k, weight, act, smooth=True, rank=rank),), bias=True)
