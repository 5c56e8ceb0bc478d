"""The fp4 kernels compile for Blackwell: the block-scaled instruction, no spills, shared and tensor memory
that fit.

Every tile of `launch.TILES` is compiled in each of KINDS. sm_103 and sm_121 take the tiles of sm_100 and
sm_120; the disassembler of Triton 3.6 does not know them.
"""

import re

import pytest

from comfyui_nibble.kernels.fp4 import launch, refused
from comfyui_nibble.kernels.target import Target, triton_version
from comfyui_nibble.quant_core.evaluation.bench.predict.kernels import FP4_GEMM, fp4_quantizer
from comfyui_nibble.tests.kernels import gate

MODULE = "comfyui_nibble.kernels.fp4.triton"
TARGETS = {arch: Target("cuda", arch, triton_version()) for arch in (100, 120)}
FORMATS = {"nvfp4": 16, "mxfp4": 32}

UNALIGNED = FP4_GEMM | dict.fromkeys(("N", "R", "ld_sx", "ld_sw", "ldy", "ld_low", "ld_up"), "i32")

# level, block, either of two scales, rank, rotation, prologue, smooth, principal components
SETTINGS = {
    "nvfp4, rank 32": (2, 16, False, 32, 0, 0, True, 0),
    "nvfp4 given": (1, 16, False, 0, 0, 0, False, 0),
    "mxfp4, rank 32": (0, 32, False, 32, 0, 0, True, 0),
    "mxfp4, rank 64": (0, 32, False, 64, 0, 0, True, 0),
    "SVDQuant": (2, 16, True, 32, 0, 0, True, 0),
    "SVDQuant after LayerNorm": (2, 16, True, 64, 0, 2, True, 0),
    "H64 after GELU": (2, 16, True, 64, 64, 1, True, 0),
    "H256": (2, 16, True, 32, 256, 0, True, 0),
    "H256 after LayerNorm": (2, 16, True, 64, 256, 2, True, 0),
    "H256 and 32 components": (2, 16, True, 0, 256, 0, True, 32),
}

# Strides of 16 bytes and whole steps of K; neither; the former, adding to y.
KINDS = ("aligned", "unaligned", "adding")
PRODUCTS = [(a, name, i, kind) for a in TARGETS for name in FORMATS for i in range(3) for kind in KINDS]
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
    if test == "test_quantizer":
        return pool.submit(gate.compile_kernel, *fp4_quantizer(target, *SETTINGS[case[1]]).arguments)
    arch, name, index, kind = case
    tile = launch.tiles(target)[index]
    row_bytes = 1568 if kind == "unaligned" else 1536
    settings = FORMATS[name], row_bytes, 32, name == "nvfp4", True, kind == "adding"
    signature = UNALIGNED if kind == "unaligned" else FP4_GEMM
    made, options = (
        launch.constants(target, tile, *settings),
        {"num_warps": tile.warps, "num_stages": tile.stages},
    )
    return pool.submit(gate.compile_kernel, MODULE, "gemm_fp4_kernel", signature, made, arch, options)


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


@pytest.mark.parametrize(("arch", "name", "index", "kind"), PRODUCTS)
def test_product(compiled, arch, name, index, kind):
    result = compiled[arch, name, index, kind].result()
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
