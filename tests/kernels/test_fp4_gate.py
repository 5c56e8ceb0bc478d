"""The fp4 kernels compile for Blackwell: the block-scaled instruction, no spills, shared and tensor memory
that fit.

Every tile of `launch.TILES` is compiled twice: with strides of 16 bytes and whole steps of K, and with
neither. sm_103 and sm_121 take the tiles of sm_100 and sm_120; the disassembler of Triton 3.6 does not know
them.
"""

import re

import pytest

from comfyui_nibble.kernels.fp4 import launch, refused
from comfyui_nibble.kernels.target import Target, triton_version
from comfyui_nibble.tests.kernels import gate

MODULE = "comfyui_nibble.kernels.fp4.triton"
TARGETS = {arch: Target("cuda", arch, triton_version()) for arch in (100, 120)}
FORMATS = {"nvfp4": 16, "mxfp4": 32}

GEMM = dict.fromkeys(("x_ptr", "w_ptr", "sx_ptr", "sw_ptr"), "u8*") | dict.fromkeys(
    ("tx_ptr", "tw_ptr"), "fp32*"
)
GEMM |= dict.fromkeys(("low_ptr", "up_ptr", "bias_ptr", "y_ptr"), "bf16*") | {"M": "i32", "step_tw": "i32"}
GEMM |= dict.fromkeys(("N", "KB", "R", "ldx", "ldw", "ld_sx", "ld_sw", "ldy", "ld_low", "ld_up"), "i32:16")
UNALIGNED = GEMM | dict.fromkeys(("N", "R", "ld_sx", "ld_sw", "ldy", "ld_low", "ld_up"), "i32")

QUANTIZER = dict.fromkeys(("x_ptr", "smooth_ptr", "down_ptr", "low_ptr"), "bf16*") | dict.fromkeys(
    ("given_ptr", "t_ptr"), "fp32*"
)
QUANTIZER |= dict.fromkeys(("q_ptr", "s_ptr"), "u8*") | {"M": "i32", "lds": "i32"}
QUANTIZER |= dict.fromkeys(("K", "R", "ldx", "ldq", "ld_down", "ld_low"), "i32:16")
# block, rank, smooth, a scale given for the tensor
SETTINGS = {
    "nvfp4, rank 32": (16, 32, True, False),
    "nvfp4, rank 64": (16, 64, True, False),
    "nvfp4 given": (16, 0, False, True),
    "mxfp4, rank 32": (32, 32, True, False),
    "mxfp4, rank 64": (32, 64, True, False),
}

PRODUCTS = [
    (a, name, i, aligned) for a in TARGETS for name in FORMATS for i in range(3) for aligned in (True, False)
]
QUANTIZERS = [(a, name) for a in TARGETS for name in SETTINGS]
INSTRUCTION = {
    (100, "nvfp4"): (r"tcgen05\.mma\.\S*kind::mxf4nvf4\.block_scale\.(scale_vec::4X|block16)", r"UTCOMMA"),
    (100, "mxfp4"): (r"tcgen05\.mma\.\S*kind::mxf4(nvf4)?\.block_scale\.(scale_vec::2X|block32)", r"UTCOMMA"),
    (120, "nvfp4"): (r"mma\.sync\.\S*m16n8k64\S*kind::mxf4nvf4\.block_scale\.scale_vec::4X\S*ue4m3",
    r"OMMA\.SF\.16864\S*E2M1\.E2M1\.UE4M3"),
    (120, "mxfp4"): (r"mma\.sync\.\S*m16n8k64\S*kind::mxf4(nvf4)?\.block_scale\.scale_vec::2X\S*ue8m0",
    r"OMMA\.SF\.16864\S*E2M1\.E2M1\.E8"),
}  # fmt: skip


def submit(pool, test, case):
    target = TARGETS[case[0]]
    if test == "test_product":
        arch, name, index, aligned = case
        tile = launch.tiles(target)[index]
        row_bytes = 1536 if aligned else 1568
        constants = launch.constants(target, tile, FORMATS[name], row_bytes, 32, name == "nvfp4", True)
        kernel, signature = "gemm_fp4_kernel", GEMM if aligned else UNALIGNED
    else:
        arch, name = case
        block, rank, smooth, given = SETTINGS[name]
        tile = launch.QUANTIZER_TILE
        constants = launch.quantizer_constants(target, tile, block, rank, smooth, given)
        kernel, signature = "quantize_fp4_kernel", QUANTIZER
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return pool.submit(gate.compile_kernel, MODULE, kernel, signature, constants, arch, options)


@pytest.fixture(scope="module")
def compiled(request):
    """{case: Future of Compiled} of the tests that were selected, on two processes."""
    with gate.pool() as pool:
        selected = [i for i in request.session.items if i.path == request.path]
        yield {
            case: submit(pool, i.originalname, case)
            for i in selected
            if (case := tuple(i.callspec.params.values()))
        }


def check(result, arch):
    assert refused(TARGETS[arch]) is None
    assert result.spills == 0, f"{result.spills} bytes or registers spilled"
    assert result.shared <= TARGETS[arch].shared_bytes
    columns = [int(n) for n in re.findall(r"tcgen05\.alloc\S*\s+\[[^]]*\],\s*(\d+)", result.text)]
    assert sum(columns) <= 512, "tensor memory"


@pytest.mark.parametrize(("arch", "name", "index", "aligned"), PRODUCTS)
def test_product(compiled, arch, name, index, aligned):
    result = compiled[arch, name, index, aligned].result()
    check(result, arch)
    ptx, sass = INSTRUCTION[arch, name]
    assert re.search(ptx, result.text)
    assert [n for n in result.instructions if re.match(sass, n)], (
        f"expected {sass}, found {result.instructions}"
    )
    # The rest of the matrix instructions are the low rank's: nothing is decoded to 16 bit.
    tile = launch.tiles(TARGETS[arch])[index]
    sixteen = sum(n for i, n in result.instructions.items() if re.match("HMMA|UTCHMMA", i))
    assert sixteen <= (
        2 if arch == 100 else tile.bm // 16 * tile.bn // 8 * tile.rank_block // 16 // tile.warps
    )


@pytest.mark.parametrize(("arch", "name"), QUANTIZERS)
def test_quantizer(compiled, arch, name):
    check(compiled[arch, name].result(), arch)
