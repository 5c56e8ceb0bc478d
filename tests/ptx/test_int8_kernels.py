"""The int8 kernel's own PTX with packed weights: its inline unpacking, its planes, and Hopper's orientation,
on sm_80 and exact.

The interpreter takes the portable unpacking and no PTX emulator of ours runs wgmma; compiled for sm_80 the
same source uses mma.sync.
"""

from itertools import pairwise

import numpy as np
import pytest

from comfyui_nibble.kernels import plan, tuning
from comfyui_nibble.kernels.target import Target, triton_version
from comfyui_nibble.quant_core.evaluation.bench.predict.kernels import GEMM, KERNELS
from comfyui_nibble.tests.kernels import gate
from comfyui_nibble.tests.ptx.emulator import run
from comfyui_nibble.tests.ptx.test_int4_kernels import bf16

M, N, K, R = 70, 144, 384, 16
CASES = [
    (bits, scales, swap)
    for bits in (2, 4, 8)
    for scales in (plan.CHANNEL, plan.SLICE, plan.GROUP)
    for swap in (False, True)
]
CASES = [
    c for c in CASES if c[:2] != (2, plan.GROUP)
]  # a group would be 16 bytes, below what an int8 product takes


def problem_of(bits, scales, swap):
    per_byte = 8 // bits
    block = {plan.CHANNEL: 0, plan.SLICE: 128 // per_byte, plan.GROUP: 64 // per_byte}[scales]
    return tuning.Problem("gemm_int8", per_byte, scales, swap, M, N, K // per_byte, block)


def tile_of(problem):
    # As small as the instructions allow, so that a few programs cross every edge.
    return tuning.Tile(64, 64, problem.block or 32, 4, 2, group_m=2, rank_block=16)


@pytest.fixture(scope="module")
def compiled():
    from comfyui_nibble.kernels.quant_linear.launch import constants

    target = Target("cuda", 80, triton_version())
    with gate.pool() as pool:
        jobs = {}
        for case in CASES:
            problem = problem_of(*case)
            fixed = constants(target, problem, tile_of(problem), True, R, True, False)
            options = {"num_warps": 4, "num_stages": 2}
            jobs[case] = pool.submit(
                gate.compile_kernel, f"{KERNELS}.quant_linear.triton", "gemm_int8", GEMM, fixed, 80, options
            )
        yield jobs


@pytest.mark.parametrize("case", CASES)
def test_int8_kernel_is_exact(compiled, case):
    bits, scales, _ = case
    rng, problem, kernel = np.random.default_rng(0), problem_of(*case), compiled[case].result()
    tile, planes = tile_of(problem), 8 // bits
    # 8-bit activations, but few bits where weights have 8 too: the exact sum must fit into 24 bits.
    x = rng.integers(-128, 128, (M, K)) if bits < 8 else rng.integers(-31, 32, (M, K))
    w = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (N, K))
    edges = {plan.CHANNEL: [0, K], plan.SLICE: [0, 128, 384], plan.GROUP: list(range(0, K + 1, 64))}[scales]
    sx, sw = 2.0 ** rng.integers(-1, 2, (len(edges) - 1, M)), 2.0 ** rng.integers(-5, -2, (len(edges) - 1, N))
    low, up, bias = (rng.integers(-3, 4, shape).astype(float) for shape in ((M, R), (N, R), N))
    exact = low @ up.T + bias
    for s, (a, b) in enumerate(pairwise(edges)):
        exact = exact + (x[:, a:b] @ w[:, a:b].T) * np.outer(sx[s], sw[s])

    fields = (w & (2**bits - 1)).astype(np.uint8).reshape(N, -1, planes)
    packed = sum(fields[:, :, i] << (bits * i) for i in range(planes)).astype(np.uint8)
    in_planes = np.ascontiguousarray(
        x.reshape(M, -1, planes).transpose(0, 2, 1).reshape(M, K).astype(np.int8)
    )
    ends = [e // planes for e in edges[1:]] if scales == plan.SLICE else []
    y = np.zeros((M, N), np.uint16)
    args = [
        in_planes, packed, sx.astype(np.float32), bf16(sw), *ends, *[-1] * (8 - len(ends)), bf16(low),
        bf16(up), bf16(bias), y,
        M, N, K // planes, R, K, K // planes, N, M, N, R, R, K // planes,
    ]  # fmt: skip
    counts = run(kernel.text, (-(-M // tile.bm) * -(-N // tile.bn),), args, kernel.shared)
    assert np.array_equal(y, bf16(exact))
    assert any("m16n8k32" in op and ".s8.s8." in op for op in counts)
