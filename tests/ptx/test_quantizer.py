"""The activation quantizer's own PTX against the specification: what the interpreter cannot show, as bf16
products and approximations."""

import numpy as np
import pytest
import torch

from comfyui_nibble.kernels import tuning
from comfyui_nibble.kernels.operator.packing import unpack
from comfyui_nibble.kernels.operator.quantizers import quantize_activation
from comfyui_nibble.kernels.operator.spec import ActivationSpec, PartSpec, WeightSpec
from comfyui_nibble.kernels.target import Target, triton_version
from comfyui_nibble.quant_core.evaluation.bench.predict.kernels import KERNELS, QUANTIZER
from comfyui_nibble.tests.kernels import gate
from comfyui_nibble.tests.ptx.emulator import run

M, K, R = 40, 512, 32
PARTS = {
    "SVDQuant": PartSpec(0, K, smooth=True, rank=R),
    "SVDQuant unsigned": PartSpec(
        0, K, activation=ActivationSpec(unsigned=True, shift=0.171875), smooth=True, rank=R
    ),
    "components": PartSpec(0, K, smooth=True, rank=R, principal=16),
    "ConvRot": PartSpec(
        0, K, WeightSpec(granularity="channel"), ActivationSpec(granularity="token"), rotation=256
    ),
}
CASES = [(arch, name) for arch in (80, 89) for name in PARTS]


def setting(arch, name):
    from comfyui_nibble.kernels.quant_activation.launch import constants

    part, target = PARTS[name], Target("cuda", arch, triton_version())
    act, tile = part.activation, tuning.quantizer_tile(target, part.rank, part.rotation)
    grouped = act.granularity == "group"
    fixed = constants(
        target,
        tile,
        torch.bfloat16,
        0 if part.principal else part.rank,
        part.rotation,
        0,
        part.smooth,
        grouped,
        act.bits,
        act.unsigned,
        0,
        act.shift,
        part.principal,
    )
    fixed["ROT_DTYPE"] = "tl.bfloat16"
    return part, tile, fixed, {"num_warps": tile.warps, "num_stages": tile.stages}


@pytest.fixture(scope="module")
def compiled():
    with gate.pool() as pool:
        jobs = {}
        for arch, name in CASES:
            _, _, fixed, options = setting(arch, name)
            jobs[arch, name] = pool.submit(
                gate.compile_kernel,
                f"{KERNELS}.quant_activation.triton",
                "quantize_kernel",
                QUANTIZER,
                fixed,
                arch,
                options,
            )
        yield jobs


def bits(tensor):
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_codes_scales_and_low_rank(compiled, arch, name):
    part, tile, _, _ = setting(arch, name)
    kernel = compiled[arch, name].result()
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(M, K, generator=g) * 3).bfloat16()
    smooth = (torch.rand(K, generator=g) + 0.5).bfloat16()
    down = (torch.randn(K, R, generator=g) / K**0.5).bfloat16()
    if part.principal:  # directions of length 1, of which x has much
        v = torch.linalg.qr(torch.randn(K, R, generator=g))[0]
        x = (x + 30 * torch.randn(M, R, generator=g) @ v.T).bfloat16()
        down = (v / smooth.float()[:, None]).bfloat16()
    segments = K // 64 if part.activation.granularity == "group" else 1
    codes, scale, low = (
        np.zeros((M, K // 2), np.int8),
        np.zeros((segments, M), np.float32),
        np.zeros((M, R), np.uint16),
    )
    none = np.zeros(8, np.uint16)
    rank = part.rank
    if part.principal:  # made in front of the quantizer
        low = bits(x @ down)
    args = [
        bits(x), bits(smooth), bits(down), none, none, codes, scale, low, M, K, K, rank, part.principal,
        M, K, K // 2, K // 2, R, R, 0,
        np.float32(part.activation.shift), np.float32(1), np.float32(0),
    ]  # fmt: skip
    run(kernel.text, (-(-M // tile.rows), 1), args, kernel.shared)

    wanted, wanted_scale = quantize_activation(x, part, smooth.float() if part.smooth else None, down=down)
    found = unpack(torch.from_numpy(codes), 4, part.activation.unsigned)
    if part.rotation or part.principal:  # sums of 256, or of 16, products in another order
        assert float((found.int() - wanted.int()).abs().max()) <= 1
        assert float((found != wanted).float().mean()) < 1e-3
        assert np.allclose(scale, wanted_scale.T.numpy(), rtol=1e-5)
    else:
        assert torch.equal(found, wanted)
        assert np.array_equal(scale, wanted_scale.T.numpy())
    if rank and not part.principal:
        reference = (x.double() @ down.double()).float()
        result = torch.from_numpy(low.view(np.int16)).view(torch.bfloat16).float()
        assert float((result - reference).abs().max() / reference.abs().max()) < 2**-8
