"""Layers and files in comfy-kitchen's formats, for tests."""

import json

import torch
from safetensors.torch import save_file

from comfyui_nibble.kernels.operator.packing import pack
from comfyui_nibble.tests.assets.synthetic import flux_shapes
from comfyui_nibble.tests.support import outlier_tokens

HIDDEN = 256


NAME, N, K = "double_blocks.0.img_mlp.2", HIDDEN, 4 * HIDDEN  # the layer that tests replace


SHAPES = flux_shapes(1, 0, HIDDEN, 64, 64)


def marker(conf):
    return torch.tensor(
        list((conf if isinstance(conf, str) else json.dumps(conf)).encode()), dtype=torch.uint8
    )


def written(path, state, tensors, conf=None, header=None, name=NAME, prefix=""):
    """A model with one layer replaced. tensors: {leaf: tensor}; conf, header: the two declarations."""
    out = {k: t for k, t in state.items() if k != f"{name}.weight"} | {
        f"{name}.{leaf}": t for leaf, t in tensors.items()
    }
    if conf is not None:
        out[f"{name}.comfy_quant"] = conf if isinstance(conf, torch.Tensor) else marker(conf)
    metadata = (
        {}
        if header is None
        else {"_quantization_metadata": header if isinstance(header, str) else json.dumps({"layers": header})}
    )
    save_file({prefix + k: t.contiguous() for k, t in out.items()}, path, metadata=metadata)
    return path


def weight(seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) / K**0.5


def tokens(after_gelu=False):
    return outlier_tokens(37, K, 5, after_gelu, strength=8.0)


def svdquant(unsigned, seed=0, rank=16):
    g = torch.Generator().manual_seed(seed)
    half = lambda *shape, by=1.0: (by * torch.randn(*shape, generator=g)).bfloat16()
    return {
        "weight": pack(torch.randint(-8, 8, (N, K), generator=g), 4),
        "weight_scale": (torch.rand(K // 64, N, generator=g) * 0.01 + 0.005).bfloat16(),
        "smooth_factor": (torch.rand(K, generator=g) + 0.5).bfloat16(),
        "proj_down": half(K, rank, by=0.1),
        "proj_up": half(N, rank, by=0.1),
    }


def tiles(t):
    """kitchen_tile_packed_w4a4 of natural tensors: (N/128, K/64, 32, 128), (N/128, K/64, 128) and (N/128, R,
    128)."""
    w = (
        t["weight"]
        .view(N // 128, 32, 4, K // 64, 32)
        .permute(0, 3, 1, 2, 4)
        .reshape(N // 128, K // 64, 32, 128)
    )
    scale = t["weight_scale"].view(K // 64, N // 128, 128).transpose(0, 1)
    return t | {
        "weight": w,
        "weight_scale": scale,
        "proj_up": t["proj_up"].view(N // 128, 128, -1).transpose(1, 2),
    }


KITCHEN = {leaf: f"weight_{leaf}" for leaf in ("proj_down", "proj_up", "smooth_factor")}


INT8 = {"format": "int8_tensorwise"}
