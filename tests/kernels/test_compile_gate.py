"""Every kernel that a card would run compiles for it: the expected tensor-core instruction, no spills, shared
memory that fits.

What is compiled comes from `plan.lower` and `tuning.candidates`, as at run time, so a new tile or card is
gated by being there.
"""

import re
import textwrap

import pytest
import torch

from comfyui_nibble.kernels import plan, tuning
from comfyui_nibble.kernels.cards import MMA
from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.kernels.target import Target, triton_version
from comfyui_nibble.quant_core.evaluation.bench.predict.kernels import GEMM, KERNELS, QUANTIZER, TURING_GEMM
from comfyui_nibble.tests.kernels import gate

CUDA, HIP = (80, 86, 89, 90, 100, 120), ("gfx942", "gfx950", "gfx1100", "gfx1201")
TARGETS = {a: Target("cuda", a, triton_version()) for a in CUDA} | {
    a: Target("hip", a, triton_version()) for a in HIP
}

TOKEN, CHANNEL, GROUPED = (
    ActivationSpec(granularity="token"),
    WeightSpec(granularity="channel"),
    ActivationSpec(),
)
UNSIGNED = ActivationSpec(unsigned=True, shift=0.171875)
PART = lambda start, stop, act=TOKEN, weight=CHANNEL: PartSpec(start, stop, weight, act, rank=32)
LAYERS = {
    "channel": (PART(0, 3072),),
    "slices": tuple(PART(768 * i, 768 * (i + 1)) for i in range(4)),
    "group": (PART(0, 3072, GROUPED, WeightSpec()),),
    "group unsigned": (PART(0, 12288, UNSIGNED, WeightSpec()),),
    "W8A8": (PART(0, 3072, ActivationSpec(bits=8, granularity="token"), WeightSpec(8, "channel")),),
    "ternary A4": (PART(0, 3072, TOKEN, WeightSpec(2, "channel")),),
}
EIGHT = ActivationSpec(bits=8, granularity="token"), WeightSpec(8, "channel")
HOPPER_LAYERS = LAYERS | {"W8A8 slices": tuple(PART(768 * i, 768 * (i + 1), *EIGHT) for i in range(4))}

GEMM_HALF = GEMM | dict.fromkeys(("sw_ptr", "low_ptr", "up_ptr", "bias_ptr"), "fp16*")


def candidate(arch, layer, index):
    """(problem, tile) of one candidate of a layer's launch, None where there are fewer. Index -1: the default
    at 64 tokens."""
    parts, target = HOPPER_LAYERS[layer], TARGETS[arch]
    step = plan.lower(LinearSpec(parts[-1].stop, 3072, parts), target)[0]
    tokens = 4608 if index >= 0 else 64
    problem = tuning.Problem(
        step.kernel, step.planes, step.scales, step.swap, tokens, 3072, step.row_bytes, step.block
    )
    tiles = tuning.candidates(target, problem)
    return (problem, tiles[max(index, 0)]) if index < len(tiles) else None


def product_case(arch, layer, index):
    """(kernel, constants, options)."""
    from comfyui_nibble.kernels.quant_linear.launch import constants

    problem, tile = candidate(arch, layer, index)
    chosen = constants(TARGETS[arch], problem, tile, True, 32, True, False)
    return problem.kernel, chosen, {"num_warps": tile.warps, "num_stages": tile.stages}


def hopper_case(layer, index, rank, has_bias, accumulate, dtype):
    """(signature, constants, options) of a candidate in Gluon."""
    from comfyui_nibble.kernels.quant_linear.hopper import tile_layout
    from comfyui_nibble.kernels.quant_linear.launch import hopper_constants

    problem, tile = candidate(90, layer, index)
    tiles = {"x_desc": tile.bm, "w_desc": tile.bn}
    signature = GEMM | {
        name: f"tensordesc<i8[{rows}, {tile.bk}],{tile_layout(tile.bk)!r}>" for name, rows in tiles.items()
    }
    signature |= dict.fromkeys(("sw_ptr", "low_ptr", "up_ptr", "bias_ptr", "y_ptr"), f"{dtype}*")
    return signature, hopper_constants(problem, tile, rank, has_bias, accumulate), {"num_warps": tile.warps}


# rank, rotation, prologue, smooth, grouped, bits, unsigned, planes, shift, principal components
SETTINGS = {
    "SVDQuant": (32, 0, 0, True, True, 4, False, 0),
    "SVDQuant after LayerNorm": (32, 0, 2, True, True, 4, False, 0),
    "SVDQuant after GELU": (32, 0, 1, True, True, 4, True, 0),
    "H256 and rank 64": (64, 256, 0, True, True, 4, False, 2),
    "ConvRot": (0, 256, 0, False, False, 4, False, 2),
    "SplitQuant": (0, 256, 0, True, True, 4, False, 0),
    "W8A8": (32, 128, 0, True, False, 8, False, 1),
    "RobuQ": (0, 64, 0, False, False, 3, False, 4),
    "RobuQ A1": (0, 64, 0, False, False, 1, False, 4),
    "16 components": (0, 0, 0, True, True, 4, False, 0, 0.0, 16),
    "H256 and 32 components": (0, 256, 0, True, True, 4, False, 2, 0.0, 32),
}
WEIGHT_ONLY = dict.fromkeys(("x_ptr", "sw_ptr", "bias_ptr", "y_ptr"), "bf16*") | {"w_ptr": "i8*", "M": "i32"}
WEIGHT_ONLY |= dict.fromkeys(("N", "KB", "ldx", "ldw", "ldy", "ld_sw"), "i32:16")


def quantizer_case(arch, name):
    from comfyui_nibble.kernels.quant_activation.launch import constants

    target = TARGETS[arch]
    rank, rotation, *rest = SETTINGS[name]
    if max([rank, *rest[7:]]) > tuning.low_rank_limit(target, rotation):
        rank, rest = 0, rest[:6]  # the dispatch takes the product elsewhere, or the whole layer
    tile = tuning.quantizer_tile(target, rank, rotation)
    return constants(target, tile, torch.bfloat16, rank, rotation, *rest), {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def weight_only_case(arch, rows):
    from comfyui_nibble.kernels.weight_only.launch import constants, options

    chosen = constants(TARGETS[arch], rows, 4, 64, True)
    return chosen, options(TARGETS[arch], chosen["BM"])


CANDIDATES = [(a, layer, i) for a in TARGETS for layer in LAYERS for i in range(-1, 12)]
PRODUCTS = [case for case in CANDIDATES if (found := candidate(*case)) and not found[1].gluon]
# layer, index, rank, has_bias, accumulate, dtype: with everything a launch may have, and with the least.
GLUON = [
    (layer, i)
    for layer in HOPPER_LAYERS
    for i in range(12)
    if (found := candidate(90, layer, i)) and found[1].gluon
]
GLUON = [
    (*case, *kind)
    for case in GLUON
    for kind in ((32, True, False, "bf16"), (32, True, True, "fp16"), (0, False, False, "bf16"))
]
QUANTIZERS = [(a, name) for a in TARGETS for name in SETTINGS]
WEIGHT_ONLIES = [(a, rows) for a in TARGETS for rows in (1, 64)]


def submit(pool, test, case):
    if test == "test_product":
        kernel, constants, options = product_case(*case)
        return pool.submit(
            gate.compile_kernel, f"{KERNELS}.quant_linear.triton", kernel, GEMM, constants, case[0], options
        )
    if test == "test_sums_of_fp16_launches":
        kernel, constants, options = product_case(*case, "ternary A4", 0)
        signature, constants = GEMM_HALF | {"y_ptr": "fp32*"}, constants | {"ACCUMULATE": True}
        return pool.submit(
            gate.compile_kernel,
            f"{KERNELS}.quant_linear.triton",
            kernel,
            signature,
            constants,
            case[0],
            options,
        )
    if test == "test_hopper":
        return pool.submit(
            gate.compile_kernel,
            f"{KERNELS}.quant_linear.hopper",
            "gemm_wgmma",
            *hopper_case(*case)[:2],
            90,
            hopper_case(*case)[2],
        )
    if test == "test_turing":
        constants, options = turing_case(*case)
        return pool.submit(
            gate.compile_kernel,
            f"{KERNELS}.quant_linear.turing",
            "gemm_m8n8k32",
            TURING_GEMM,
            constants,
            75,
            options,
        )
    if test == "test_quantizer":
        constants, options = quantizer_case(*case)
        constants["ROT_DTYPE"] = {"bf16": "tl.bfloat16", "fp16": "tl.float16"}[str(constants["ROT_DTYPE"])]
        return pool.submit(
            gate.compile_kernel,
            f"{KERNELS}.quant_activation.triton",
            "quantize_kernel",
            QUANTIZER,
            constants,
            case[0],
            options,
        )
    constants, options = weight_only_case(*case)
    return pool.submit(
        gate.compile_kernel,
        f"{KERNELS}.weight_only.triton",
        "weight_only_kernel",
        WEIGHT_ONLY,
        constants,
        case[0],
        options,
    )


@pytest.fixture(scope="module")
def compiled(request):
    """{case: Future of Compiled} of the tests that were selected, on two processes."""
    with gate.pool() as pool:
        selected = [i for i in request.session.items if i.path == request.path and hasattr(i, "callspec")]
        yield {
            case: submit(pool, i.originalname, case)
            for i in selected
            if (case := tuple(i.callspec.params.values()))
        }


def check(result, arch, product):
    if product:
        assert [n for n in result.instructions if re.match(product, n)], (
            f"expected {product}, found {result.instructions}"
        )
    assert result.spills == 0, f"{result.spills} bytes or registers spilled"
    assert result.shared <= TARGETS[arch].shared_bytes
    assert not result.serialized, "ptxas serialised the wgmmas"


def turing_case(layer, index):
    from comfyui_nibble.kernels.quant_linear.launch import turing_constants

    target = Target("cuda", 75, triton_version())
    parts = LAYERS[layer]
    step = plan.lower(LinearSpec(parts[-1].stop, 3072, parts), target)[0]
    problem = tuning.Problem(
        step.kernel, step.planes, step.scales, step.swap, 4608, 3072, step.row_bytes, step.block
    )
    tile = tuning.candidates(target, problem)[index]
    return turing_constants(problem, tile, True, True, False), {"num_warps": tile.warps}


def expected_product(arch, layer):
    if arch in HIP:
        return "v_mfma_i32_32x32x|v_mfma_i32_16x16x" if arch.startswith("gfx9") else "v_wmma_i32_16x16x16_iu8"
    if arch == 90:
        return r"IGMMA\.64x\d+x32\.S8\.S8"
    if Target("cuda", arch).card.int4 == MMA and layer not in ("W8A8", "ternary A4"):
        return r"IMMA\.16864\.U4\.S4" if layer == "group unsigned" else r"IMMA\.16864\.S4\.S4"
    return r"IMMA\.16832\.S8\.S8|UTCIMMA"  # on sm_100 from Triton 3.9 on


SIXTEEN_BIT = r"HMMA|HGMMA|UTCHMMA|v_mfma_f32|v_wmma_f32"


@pytest.mark.parametrize(("arch", "layer", "index"), PRODUCTS)
def test_product(compiled, arch, layer, index):
    check(compiled[arch, layer, index].result(), arch, expected_product(arch, layer))


@pytest.mark.parametrize("arch", [80, 89, 120, *HIP])
def test_sums_of_fp16_launches(compiled, arch):
    """In fp32 between the launches of a layer that takes several; Hopper's own kernel spills 0.3 kB in two of
    its tiles so."""
    check(compiled[arch,].result(), arch, expected_product(arch, "ternary A4"))


@pytest.mark.parametrize(("layer", "index", "rank", "has_bias", "accumulate", "dtype"), GLUON)
def test_hopper(compiled, layer, index, rank, has_bias, accumulate, dtype):
    result = compiled[layer, index, rank, has_bias, accumulate, dtype].result()
    check(result, 90, expected_product(90, layer))
    # Every wait of the main loop leaves a wgmma running. Nothing but a wgmma may write its sums, or ptxas
    # waits for all of them.
    assert result.waits
    assert min(result.waits) >= 1


def test_waits_are_those_of_the_innermost_loops_with_products():
    sass = """
    .L_x_1:
        WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    .L_x_2:
        IGMMA.64x128x32.S8.S8 R1, R2, gdesc[UR4], R1, gsb0 ;
        WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        @!P0 BRA `(.L_x_4) ;
        WARPGROUP.DEPBAR.LE gsb0, 0x2 ;
        @P0 BRA `(.L_x_2) ;
        @P1 BRA `(.L_x_1) ;
    .L_x_3:
        WARPGROUP.DEPBAR.LE gsb0, 0x3 ;
        @P0 BRA `(.L_x_3) ;
        EXIT ;
    .L_x_4:
        BRA `(.L_x_2) ;
    """
    assert gate.waits_in_loops(textwrap.dedent(sass)) == (1, 2)


@pytest.mark.parametrize(
    ("layer", "index"), [("channel", 0), ("channel", 1), ("slices", 0), ("group", 0), ("group unsigned", 0)]
)
def test_turing(compiled, layer, index):
    result = compiled[layer, index].result()
    assert set(result.instructions) == {"IMMA.8832.U4.S4" if layer == "group unsigned" else "IMMA.8832.S4.S4"}
    assert result.spills == 0


@pytest.mark.parametrize(("arch", "name"), QUANTIZERS)
def test_quantizer(compiled, arch, name):
    rank, rotation = SETTINGS[name][:2]
    check(compiled[arch, name].result(), arch, SIXTEEN_BIT if rank or rotation else None)


@pytest.mark.parametrize(("arch", "rows"), WEIGHT_ONLIES)
def test_weight_only(compiled, arch, rows):
    check(compiled[arch, rows].result(), arch, SIXTEEN_BIT)
