"""The INT4 kernels' own PTX, run instruction by instruction: exact against integers, and wrong where the
rewrite is taken away.

Scales are powers of two and everything added is a small integer over 16, so the true result has at most 24
bits and rounds to 16 in one way only: every output must be equal bit for bit.
"""

from itertools import pairwise

import numpy as np
import pytest

from comfyui_nibble.kernels import plan, tuning
from comfyui_nibble.kernels.native_int4 import INT8, REWRITES
from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.kernels.target import Target, triton_version
from comfyui_nibble.quant_core.evaluation.bench.predict.kernels import GEMM, KERNELS, TURING_GEMM
from comfyui_nibble.tests.kernels import gate
from comfyui_nibble.tests.ptx.emulator import run

M, N, K, R = 100, 144, 384, 16
TOKEN, CHANNEL = ActivationSpec(granularity="token"), WeightSpec(granularity="channel")
UNSIGNED = ActivationSpec(unsigned=True, shift=0.171875)
PARTS = {
    "channel": (PartSpec(0, K, CHANNEL, TOKEN),),
    "slices": (
        PartSpec(0, 128, CHANNEL, TOKEN),
        PartSpec(128, 192, CHANNEL, TOKEN),
        PartSpec(192, K, CHANNEL, TOKEN),
    ),
    "group": (PartSpec(0, K),),
    "group unsigned": (PartSpec(0, K, WeightSpec(), UNSIGNED),),
}
NATIVE = [(arch, layer) for arch in (80, 86, 89) for layer in PARTS]


class Case:
    """One launch on random operands, the compiled kernel's arguments and the exact result."""

    def __init__(self, arch, layer, seed=0):
        self.rng = np.random.default_rng(seed)
        self.layer, self.target, self.parts = layer, Target("cuda", arch, triton_version()), PARTS[layer]
        (self.step,) = plan.lower(LinearSpec(K, N, self.parts), self.target)
        self.problem = tuning.Problem(
            self.step.kernel, 0, self.step.scales, False, M, N, K // 2, self.step.block
        )
        self.tile = next(t for t in tuning.candidates(self.target, self.problem) if not t.gluon)
        low, high = (0, 16) if layer == "group unsigned" else (-8, 8)
        self.x, self.w = self.rng.integers(low, high, (M, K)), self.rng.integers(-8, 8, (N, K))
        edges = [0, *(p.stop for p in self.parts)] if self.step.scales == plan.SLICE else [0, K]
        if self.step.scales == plan.GROUP:
            edges = list(range(0, K + 1, 64))
        self.sx, self.sw = self.powers(len(edges) - 1, M), self.powers(len(edges) - 1, N) / 16
        self.low, self.up, self.bias = self.integers(M, R), self.integers(N, R), self.integers(N)
        product = sum(
            (self.x[:, a:b] @ self.w[:, a:b].T) * np.outer(self.sx[s], self.sw[s])
            for s, (a, b) in enumerate(pairwise(edges))
        )
        self.plain = product + self.bias
        self.exact = self.plain + self.low @ self.up.T

    def powers(self, *shape):
        return 2.0 ** self.rng.integers(-1, 2, shape)

    def integers(self, *shape):
        return self.rng.integers(-3, 4, shape).astype(float)

    def ends(self):
        return [*self.step.ends, *[-1] * (8 - len(self.step.ends))]

    def launch(self, ptx, shared):
        y = np.zeros((M, N), np.uint16)
        args = [
            pack(self.x), pack(self.w), self.sx.astype(np.float32), bf16(self.sw), *self.ends(),
            bf16(self.low), bf16(self.up),
            bf16(self.bias), y, M, N, K // 2, R, K // 2, K // 2, N, M, N, R, R, K // 2,
        ]  # fmt: skip
        counts = run(ptx, (-(-M // self.tile.bm) * -(-N // self.tile.bn),), args, shared)
        return y, counts


def pack(codes):
    nibbles = codes.astype(np.uint8) & 15
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def bf16(values):
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


@pytest.fixture(scope="module")
def compiled():
    from comfyui_nibble.kernels.quant_linear.launch import constants, turing_constants

    jobs = {}
    with gate.pool() as pool:
        for arch, layer in NATIVE:
            case = Case(arch, layer)
            fixed = constants(case.target, case.problem, case.tile, True, R, True, False)
            options = {"num_warps": case.tile.warps, "num_stages": case.tile.stages}
            jobs[arch, layer] = pool.submit(
                gate.compile_kernel,
                f"{KERNELS}.quant_linear.triton",
                case.step.kernel,
                GEMM,
                fixed,
                arch,
                options,
            )
        for layer in PARTS:
            case = Case(75, layer)
            fixed = turing_constants(case.problem, case.tile, True, True, False)
            jobs[75, layer] = pool.submit(
                gate.compile_kernel,
                f"{KERNELS}.quant_linear.turing",
                "gemm_m8n8k32",
                TURING_GEMM,
                fixed,
                75,
                {"num_warps": case.tile.warps},
            )
        yield jobs


@pytest.mark.parametrize(("arch", "layer"), NATIVE)
def test_native_kernel_is_exact(compiled, arch, layer):
    case, kernel = Case(arch, layer), compiled[arch, layer].result()
    y, counts = case.launch(kernel.text, kernel.shared)
    assert np.array_equal(y, bf16(case.exact))
    assert any("m16n8k64" in op and ".u4.s4." in op for op in counts) == (layer == "group unsigned")


@pytest.mark.parametrize("layer", PARTS)
def test_without_the_rewrite_the_result_is_wrong(compiled, layer):
    case, kernel = Case(80, layer), compiled[80, layer].result()
    ptx = kernel.text
    for instruction in REWRITES.values():
        ptx = ptx.replace(instruction, INT8)
    assert ptx != kernel.text
    y, _ = case.launch(ptx, kernel.shared)
    assert (y == bf16(case.exact)).mean() < 0.01


@pytest.mark.parametrize("layer", PARTS)
def test_turing_kernel_is_exact(compiled, layer):
    case, kernel = Case(75, layer), compiled[75, layer].result()
    y = np.zeros((M, N), np.float16)
    args = [
        pack(case.x).view(np.int32), pack(case.w).view(np.int32), case.sx.astype(np.float32),
        case.sw.astype(np.float16), *case.ends(),
        case.bias.astype(np.float16), y, M, N, K // 2, K // 8, K // 8, N, M, N,
    ]  # fmt: skip
    counts = run(kernel.text, (-(-M // case.tile.bm), -(-N // case.tile.bn)), args, kernel.shared)
    assert np.array_equal(y, case.plain.astype(np.float16))
    assert any("m8n8k32" in op for op in counts)
