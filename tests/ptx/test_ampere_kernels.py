"""The PTX of Ampere's and Ada's kernel in Gluon, run instruction by instruction: exact against integers, for
every tile, with rows, columns and stages past the end. Scales and sums are as in `test_int4_kernels`."""

from itertools import pairwise

import numpy as np
import pytest

from comfyui_nibble.kernels import plan, tuning
from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.kernels.target import Target, triton_version
from comfyui_nibble.quant_core.evaluation.bench.predict.kernels import GEMM, KERNELS
from comfyui_nibble.tests.kernels import gate
from comfyui_nibble.tests.ptx.emulator import run
from comfyui_nibble.tests.ptx.test_int4_kernels import bf16, pack

M, N, K, R = 100, 144, 768, 16
TOKEN, CHANNEL = ActivationSpec(granularity="token"), WeightSpec(granularity="channel")
PARTS = {
    "channel": PartSpec(0, K, CHANNEL, TOKEN),
    "group": PartSpec(0, K),
    "group unsigned": PartSpec(0, K, WeightSpec(), ActivationSpec(unsigned=True, shift=0.171875)),
    "W8A8": PartSpec(0, K, WeightSpec(8, "channel"), ActivationSpec(8, "token")),
}
TARGETS = {arch: Target("cuda", arch, triton_version()) for arch in (80, 89)}


def problem_of(layer, target):
    (step,) = plan.lower(LinearSpec(K, N, (PARTS[layer],)), target)
    problem = tuning.Problem(step.kernel, step.planes, step.scales, False, M, N, step.row_bytes, step.block)
    return problem, [t for t in tuning.candidates(target, problem) if t.gluon]


CASES = [
    (arch, layer, i)
    for arch, target in TARGETS.items()
    for layer in PARTS
    for i in range(len(problem_of(layer, target)[1]))
]


@pytest.fixture(scope="module")
def compiled():
    from comfyui_nibble.kernels.quant_linear.launch import ampere_constants

    jobs = {}
    with gate.pool() as pool:
        for case in CASES:
            problem, tiles = problem_of(case[1], TARGETS[case[0]])
            tile = tiles[case[2]]
            fixed = ampere_constants(problem, tile, True, R, True, False)
            jobs[case] = pool.submit(
                gate.compile_kernel,
                f"{KERNELS}.quant_linear.ampere",
                problem.kernel.replace("gemm", "ampere"),
                GEMM,
                fixed,
                case[0],
                {"num_warps": tile.warps},
            )
        yield jobs


def test_every_kind_of_layer_has_a_tile():
    assert {(arch, layer) for arch, layer, _ in CASES} == {(a, layer) for a in TARGETS for layer in PARTS}


@pytest.mark.parametrize(("arch", "layer", "index"), CASES)
def test_kernel_is_exact(compiled, arch, layer, index):
    problem, tiles = problem_of(layer, TARGETS[arch])
    kernel, tile, rng = compiled[arch, layer, index].result(), tiles[index], np.random.default_rng(0)
    eight = layer == "W8A8"
    top = 128 if eight else 8
    low, high = (0, 16) if layer == "group unsigned" else (-top, top)
    x, w = rng.integers(low, high, (M, K)), rng.integers(-top, top, (N, K))
    edges = list(range(0, K + 1, 64)) if problem.scales == plan.GROUP else [0, K]
    powers = lambda *shape: 2.0 ** rng.integers(-1, 2, shape)
    integers = lambda *shape: rng.integers(-3, 4, shape).astype(float)
    sx, sw = powers(len(edges) - 1, M), powers(len(edges) - 1, N) / 16
    low, up, bias = integers(M, R), integers(N, R), integers(N)
    exact = bias + low @ up.T
    for s, (a, b) in enumerate(pairwise(edges)):
        exact = exact + (x[:, a:b] @ w[:, a:b].T) * np.outer(sx[s], sw[s])
    y = np.zeros((M, N), np.uint16)
    codes = (x.astype(np.int8), w.astype(np.int8)) if eight else (pack(x), pack(w))
    row = problem.row_bytes
    args = [
        *codes, sx.astype(np.float32), bf16(sw), *[-1] * 8, bf16(low), bf16(up), bf16(bias), y,
        M, N, row, R, row, row, N, M, N, R, R, row,
    ]  # fmt: skip
    counts = run(kernel.text, (-(-M // tile.bm) * -(-N // tile.bn),), args, kernel.shared)
    assert np.array_equal(y, bf16(exact))
    wanted = "m16n8k32" if eight else "m16n8k64"
    assert any(wanted in op and (".u4.s4." in op) == (layer == "group unsigned") for op in counts)
