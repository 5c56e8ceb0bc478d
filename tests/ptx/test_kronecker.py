"""The PTX of the activation quantizer with a learned transform against the specification: fp16 products,
transposes, packed codes."""

import numpy as np
import pytest
import torch

from comfyui_nibble.kernels import tuning
from comfyui_nibble.kernels.operator.packing import unpack
from comfyui_nibble.kernels.operator.spec import ActivationSpec
from comfyui_nibble.kernels.target import Target, triton_version
from comfyui_nibble.quant_core.evaluation.bench.predict.kernels import KERNELS
from comfyui_nibble.tests.kernels import gate
from comfyui_nibble.tests.kernels.test_kronecker import check, expected, factors_of, layer_of, tokens
from comfyui_nibble.tests.kernels.test_kronecker_gate import QUANTIZER
from comfyui_nibble.tests.ptx.emulator import run
from comfyui_nibble.tests.ptx.test_quantizer import bits

M = 6  # a program of four tokens and half of one
# sizes, slices, per slice, bits
CASES = {
    "3072 in 4": ((24, 32), 4, False, 4),
    "1152 in 4": ((16, 18), 4, False, 4),
    "a transform each": ((16, 16), 2, True, 4),
    "1 bit": ((16, 16), 4, False, 1),
    "8 bit": ((24, 32), 2, False, 8),
}
SETTINGS = [
    (80, "3072 in 4"),
    (89, "3072 in 4"),
    (89, "1152 in 4"),
    (80, "a transform each"),
    (89, "1 bit"),
    (80, "8 bit"),
]


def case_of(arch, name):
    """(spec, tile, constants, planes)."""
    from comfyui_nibble.kernels.quant_activation.launch import kronecker_constants

    sizes, slices, per_slice, width = CASES[name]
    spec = layer_of(sizes, slices, ActivationSpec(width, "token"), per_slice=per_slice)
    target, planes = Target("cuda", arch, triton_version()), 2 if width == 8 else 0
    tile = tuning.kronecker_tile(target, *sizes, slices, per_slice)
    return (
        spec,
        tile,
        kronecker_constants(target, tile, *sizes, slices, per_slice, 0, True, width, False, planes),
        planes,
    )


@pytest.fixture(scope="module")
def compiled():
    with gate.pool() as pool:
        jobs = {}
        for case in SETTINGS:
            _, tile, fixed, _ = case_of(*case)
            module, options = (
                f"{KERNELS}.quant_activation.kronecker",
                {"num_warps": tile.warps, "num_stages": 1},
            )
            jobs[case] = pool.submit(
                gate.compile_kernel, module, "quantize_kronecker_kernel", QUANTIZER, fixed, case[0], options
            )
        yield jobs


@pytest.mark.parametrize("case", SETTINGS, ids=str)
def test_codes_and_scales(compiled, case):
    spec, tile, _, planes = case_of(*case)
    kernel, k = compiled[case].result(), spec.in_features
    x, smooth = tokens(M, k, torch.bfloat16)
    transform, act = factors_of(spec), spec.parts[0].activation
    codes, scale, none = (
        np.zeros((M, k if planes else k // 2), np.int8),
        np.zeros((1, M), np.float32),
        np.zeros(8, np.uint16),
    )
    args = [
        bits(x), smooth.numpy(), transform.numpy(), none, none, codes, scale, M, M, k, codes.shape[1], k // 2,
        0,
        np.float32(act.clip), np.float32(0),
    ]  # fmt: skip
    counts = run(kernel.text, (-(-M // tile.rows), 1), args, kernel.shared)
    codes = torch.from_numpy(codes)
    found = codes.unflatten(1, (2, -1)).transpose(1, 2).flatten(1) if planes else unpack(codes, 4)
    check((found.short(), torch.from_numpy(scale).T), expected(x, spec, transform, smooth), act.bits)
    assert any("m16n8k16" in op and "f32.f16.f16.f32" in op for op in counts)
