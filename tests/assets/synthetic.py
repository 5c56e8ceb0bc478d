"""Shapes and seeded random checkpoints of real architectures in ComfyUI's key names."""

import math

import torch
from safetensors.torch import save_file


def _linear(shapes, name, out_features, in_features):
    shapes[f"{name}.weight"] = (out_features, in_features)
    shapes[f"{name}.bias"] = (out_features,)


def flux_shapes(double=1, single=1, hidden=3072, context=4096, pooled=768, guidance=True):
    """FLUX.1 with heads of 128."""
    shapes = {}
    _linear(shapes, "img_in", hidden, 64)
    _linear(shapes, "txt_in", hidden, context)
    for name, width in (("time_in", 256), ("vector_in", pooled)) + ((("guidance_in", 256),) if guidance else ()):
        _linear(shapes, f"{name}.in_layer", hidden, width)
        _linear(shapes, f"{name}.out_layer", hidden, hidden)
    for b in range(double):
        for stream in ("img", "txt"):
            p = f"double_blocks.{b}.{stream}_"
            _linear(shapes, p + "mod.lin", 6 * hidden, hidden)
            _linear(shapes, p + "attn.qkv", 3 * hidden, hidden)
            _linear(shapes, p + "attn.proj", hidden, hidden)
            _linear(shapes, p + "mlp.0", 4 * hidden, hidden)
            _linear(shapes, p + "mlp.2", hidden, 4 * hidden)
            shapes |= {p + "attn.norm.query_norm.scale": (128,), p + "attn.norm.key_norm.scale": (128,)}
    for b in range(single):
        p = f"single_blocks.{b}."
        _linear(shapes, p + "linear1", 7 * hidden, hidden)
        _linear(shapes, p + "linear2", hidden, 5 * hidden)
        _linear(shapes, p + "modulation.lin", 3 * hidden, hidden)
        shapes |= {p + "norm.query_norm.scale": (128,), p + "norm.key_norm.scale": (128,)}
    _linear(shapes, "final_layer.linear", 64, hidden)
    _linear(shapes, "final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return shapes


def pixart_shapes(depth=1, hidden=1152, caption=4096, tokens=300):
    """PixArt-Sigma; ComfyUI's detection fixes hidden 1152 and 16 heads."""
    shapes = {"x_embedder.proj.weight": (hidden, 4, 2, 2), "x_embedder.proj.bias": (hidden,), "y_embedder.y_embedding": (tokens, caption)}
    _linear(shapes, "t_block.1", 6 * hidden, hidden)
    _linear(shapes, "t_embedder.mlp.0", hidden, 256)
    _linear(shapes, "t_embedder.mlp.2", hidden, hidden)
    _linear(shapes, "y_embedder.y_proj.fc1", hidden, caption)
    _linear(shapes, "y_embedder.y_proj.fc2", hidden, hidden)
    for b in range(depth):
        p = f"blocks.{b}."
        shapes[p + "scale_shift_table"] = (6, hidden)
        _linear(shapes, p + "attn.qkv", 3 * hidden, hidden)
        _linear(shapes, p + "attn.proj", hidden, hidden)
        _linear(shapes, p + "cross_attn.q_linear", hidden, hidden)
        _linear(shapes, p + "cross_attn.kv_linear", 2 * hidden, hidden)
        _linear(shapes, p + "cross_attn.proj", hidden, hidden)
        _linear(shapes, p + "mlp.fc1", 4 * hidden, hidden)
        _linear(shapes, p + "mlp.fc2", hidden, 4 * hidden)
    shapes["final_layer.scale_shift_table"] = (2, hidden)
    _linear(shapes, "final_layer.linear", 32, hidden)
    return shapes


def taesd_shapes(channels):
    """A tiny autoencoder for latents of so many channels, as one file that VAELoader takes for a VAE."""
    shapes = {}
    for half, first, blocks, resize, last in (
        ("encoder", (0, 3), (1, 3, 4, 5, 7, 8, 9, 11, 12, 13), (2, 6, 10), (14, channels)),
        ("decoder", (1, channels), (3, 4, 5, 8, 9, 10, 13, 14, 15, 18), (7, 12, 17), (19, 3)),
    ):
        p = f"taesd_{half}."
        convolutions = [(f"{first[0]}", 64, first[1]), (f"{last[0]}", last[1], 64)]
        convolutions += [(f"{i}.conv.{j}", 64, 64) for i in blocks for j in (0, 2, 4)]
        for name, out, inp in convolutions:
            shapes |= {f"{p}{name}.weight": (out, inp, 3, 3), f"{p}{name}.bias": (out,)}
        # What halves or doubles the size has no bias.
        shapes |= {f"{p}{i}.weight": (64, 64, 3, 3) for i in resize}
    return shapes


def random_state(shapes, seed=0, gain=0.7, dtype=torch.bfloat16):
    """Weights of variance gain^2 / K, small biases, unit norms: activations keep their size through the model."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for key, shape in shapes.items():
        if key.endswith("_norm.scale"):
            tensor = torch.ones(shape)
        elif len(shape) == 1:
            tensor = 0.01 * torch.randn(shape, generator=g)
        else:
            fan_in = shape[-1] if key.endswith("scale_shift_table") else math.prod(shape[1:])
            tensor = torch.randn(shape, generator=g) * (gain / math.sqrt(fan_in))
        out[key] = tensor.to(dtype)
    return out


def save_random(path, shapes, seed=0):
    save_file(random_state(shapes, seed), path)
