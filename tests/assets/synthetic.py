"""Shapes and seeded random checkpoints of real architectures in ComfyUI's key names."""

import math

import torch
from safetensors.torch import save_file


def _linear(shapes, name, out_features, in_features, bias=True):
    _layer(shapes, name, (out_features, in_features), bias)


def _layer(shapes, name, weight, bias=True):
    shapes[f"{name}.weight"] = weight
    if bias:
        shapes[f"{name}.bias"] = weight[:1]


def flux_shapes(double=1, single=1, hidden=3072, context=4096, pooled=768, guidance=True, channels=64):
    """FLUX.1 with heads of 128. channels: 384 for Fill."""
    shapes = {}
    _linear(shapes, "img_in", hidden, channels)
    _linear(shapes, "txt_in", hidden, context)
    for name, width in (("time_in", 256), ("vector_in", pooled)) + (
        (("guidance_in", 256),) if guidance else ()
    ):
        _linear(shapes, f"{name}.in_layer", hidden, width)
        _linear(shapes, f"{name}.out_layer", hidden, hidden)
    _flux_blocks(shapes, double, single, hidden, modulation=True)
    _linear(shapes, "final_layer.linear", 64, hidden)
    _linear(shapes, "final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return shapes


def _flux_blocks(shapes, double, single, hidden, modulation):
    for b in range(double):
        for stream in ("img", "txt"):
            p = f"double_blocks.{b}.{stream}_"
            if modulation:
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
        if modulation:
            _linear(shapes, p + "modulation.lin", 3 * hidden, hidden)
        shapes |= {p + "norm.query_norm.scale": (128,), p + "norm.key_norm.scale": (128,)}


def flux2_shapes(double=1, single=1, hidden=6144, context=15360, guidance=True):
    """FLUX.2 with heads of 128; dev as it stands, Klein 4B has hidden 3072, context 7680 and no guidance.
    Klein 9B: 4096 and 12288."""
    shapes = {}
    _linear(shapes, "img_in", hidden, 128, bias=False)
    _linear(shapes, "txt_in", hidden, context, bias=False)
    for name in ("time_in", "guidance_in") if guidance else ("time_in",):
        _linear(shapes, f"{name}.in_layer", hidden, 256, bias=False)
        _linear(shapes, f"{name}.out_layer", hidden, hidden, bias=False)
    for name, chunks in (
        ("double_stream_modulation_img", 6),
        ("double_stream_modulation_txt", 6),
        ("single_stream_modulation", 3),
    ):
        _linear(shapes, f"{name}.lin", chunks * hidden, hidden, bias=False)
    for p in (f"double_blocks.{b}.{stream}_" for b in range(double) for stream in ("img", "txt")):
        for name, n, k in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.0", 6, 1), ("mlp.2", 1, 3)):
            _linear(shapes, p + name, n * hidden, k * hidden, bias=False)
        shapes |= {p + "attn.norm.query_norm.scale": (128,), p + "attn.norm.key_norm.scale": (128,)}
    for p in (f"single_blocks.{b}." for b in range(single)):
        _linear(shapes, p + "linear1", 9 * hidden, hidden, bias=False)
        _linear(shapes, p + "linear2", hidden, 4 * hidden, bias=False)
        shapes |= {p + "norm.query_norm.scale": (128,), p + "norm.key_norm.scale": (128,)}
    _linear(shapes, "final_layer.linear", 128, hidden, bias=False)
    _linear(shapes, "final_layer.adaLN_modulation.1", 2 * hidden, hidden, bias=False)
    return shapes


def chroma_shapes(double=1, single=1, hidden=3072, inner=5120, context=4096, radiance=False):
    """Chroma; ComfyUI's detection fixes hidden and the approximator's inner width. radiance: of pixels, with
    a small decoder."""
    p, shapes = "distilled_guidance_layer.", {}
    _linear(shapes, p + "in_proj", inner, 64)
    for i in range(5):
        _linear(shapes, f"{p}layers.{i}.in_layer", inner, inner)
        _linear(shapes, f"{p}layers.{i}.out_layer", inner, inner)
        shapes[f"{p}norms.{i}.scale"] = (inner,)
    _linear(shapes, p + "out_proj", hidden, inner)
    _linear(shapes, "txt_in", hidden, context)
    _flux_blocks(shapes, double, single, hidden, modulation=False)
    if not radiance:
        _linear(shapes, "img_in", hidden, 64)
        _linear(shapes, "final_layer.linear", 64, hidden)
        return shapes
    width, wide = 64, 256  # of the decoder, and of its MLPs
    _layer(shapes, "img_in_patch", (hidden, 3, 16, 16))
    _linear(shapes, "nerf_image_embedder.embedder.0", width, 3 + 8 * 8)
    for b in range(4):
        shapes[f"nerf_blocks.{b}.norm.scale"] = (width,)
        _linear(shapes, f"nerf_blocks.{b}.param_generator", 3 * width * wide, hidden)
    shapes["nerf_final_layer_conv.norm.scale"] = (width,)
    _layer(shapes, "nerf_final_layer_conv.conv", (3, width, 3, 3))
    return shapes


def pixart_shapes(depth=1, hidden=1152, caption=4096, tokens=300):
    """PixArt-Sigma; ComfyUI's detection fixes hidden 1152 and 16 heads."""
    shapes = {
        "x_embedder.proj.weight": (hidden, 4, 2, 2),
        "x_embedder.proj.bias": (hidden,),
        "y_embedder.y_embedding": (tokens, caption),
    }
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


def wan_shapes(depth=1, dim=128, ffn=256, channels=16, out=16, image=False, vace=0):
    """Wan with heads of 128. channels: what the first layer reads, 36 with a picture beside; image: 2.1's
    image to video; vace: its blocks."""
    shapes = {"head.modulation": (1, 2, dim)}
    _layer(shapes, "patch_embedding", (dim, channels, 1, 2, 2))
    for name, width in (("text_embedding", 4096), ("time_embedding", 256)):
        _linear(shapes, f"{name}.0", dim, width)
        _linear(shapes, f"{name}.2", dim, dim)
    _linear(shapes, "time_projection.1", 6 * dim, dim)
    _linear(shapes, "head.head", 4 * out, dim)
    if image:
        _layer(shapes, "img_emb.proj.0", (1280,))
        _linear(shapes, "img_emb.proj.1", 1280, 1280)
        _linear(shapes, "img_emb.proj.3", dim, 1280)
        _layer(shapes, "img_emb.proj.4", (dim,))
    if vace:
        _layer(shapes, "vace_patch_embedding", (dim, 96, 1, 2, 2))
        _linear(shapes, "vace_blocks.0.before_proj", dim, dim)
    for p in [f"blocks.{b}." for b in range(depth)] + [f"vace_blocks.{b}." for b in range(vace)]:
        shapes[p + "modulation"] = (1, 6, dim)
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                _linear(shapes, f"{p}{attention}.{name}", dim, dim)
            shapes |= {f"{p}{attention}.norm_{name}.weight": (dim,) for name in "qk"}
        if image:
            _linear(shapes, p + "cross_attn.k_img", dim, dim)
            _linear(shapes, p + "cross_attn.v_img", dim, dim)
            shapes[p + "cross_attn.norm_k_img.weight"] = (dim,)
        _layer(shapes, p + "norm3", (dim,))
        _linear(shapes, p + "ffn.0", ffn, dim)
        _linear(shapes, p + "ffn.2", dim, ffn)
        if p.startswith("vace"):
            _linear(shapes, p + "after_proj", dim, dim)
    return shapes


def sd3_shapes(depth=2, context=4096, pooled=2048, norm=True, twice=0, positions=64):
    """SD3.5; hidden is 64 times the depth, heads have 64. twice: as many first blocks attend to the image
    twice; positions: a side."""
    hidden, shapes = 64 * depth, {"pos_embed": (1, positions**2, 64 * depth)}
    _layer(shapes, "x_embedder.proj", (hidden, 16, 2, 2))
    _linear(shapes, "context_embedder", hidden, context)
    for name, width in (("t_embedder", 256), ("y_embedder", pooled)):
        _linear(shapes, f"{name}.mlp.0", hidden, width)
        _linear(shapes, f"{name}.mlp.2", hidden, hidden)
    for b in range(depth):
        for stream in ("context", "x"):
            p = f"joint_blocks.{b}.{stream}_block."
            last = stream == "context" and b == depth - 1
            again = stream == "x" and b < twice
            _linear(shapes, p + "adaLN_modulation.1", (2 if last else 9 if again else 6) * hidden, hidden)
            for attention in ("attn", "attn2") if again else ("attn",):
                _linear(shapes, f"{p}{attention}.qkv", 3 * hidden, hidden)
                if norm:
                    shapes |= {f"{p}{attention}.ln_q.weight": (64,), f"{p}{attention}.ln_k.weight": (64,)}
                if not last:
                    _linear(shapes, f"{p}{attention}.proj", hidden, hidden)
            if not last:
                _linear(shapes, p + "mlp.fc1", 4 * hidden, hidden)
                _linear(shapes, p + "mlp.fc2", hidden, 4 * hidden)
    _linear(shapes, "final_layer.linear", 64, hidden)
    _linear(shapes, "final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return shapes


def qwen_image_shapes(depth=1, hidden=3072, context=3584):
    """Qwen-Image with heads of 128; ComfyUI's detection fixes both widths."""
    shapes = {}
    _linear(shapes, "time_text_embed.timestep_embedder.linear_1", hidden, 256)
    _linear(shapes, "time_text_embed.timestep_embedder.linear_2", hidden, hidden)
    shapes["txt_norm.weight"] = (context,)
    _linear(shapes, "img_in", hidden, 64)
    _linear(shapes, "txt_in", hidden, context)
    for b in range(depth):
        p = f"transformer_blocks.{b}."
        for name in (
            "to_q",
            "to_k",
            "to_v",
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_out.0",
            "to_add_out",
        ):
            _linear(shapes, f"{p}attn.{name}", hidden, hidden)
        shapes |= {f"{p}attn.norm_{name}.weight": (128,) for name in ("q", "k", "added_q", "added_k")}
        for stream in ("img", "txt"):
            _linear(shapes, f"{p}{stream}_mod.1", 6 * hidden, hidden)
            _linear(shapes, f"{p}{stream}_mlp.net.0.proj", 4 * hidden, hidden)
            _linear(shapes, f"{p}{stream}_mlp.net.2", hidden, 4 * hidden)
    _linear(shapes, "norm_out.linear", 2 * hidden, hidden)
    _linear(shapes, "proj_out", 64, hidden)
    return shapes


def z_image_shapes(depth=1, hidden=3840, context=2560, refiners=2):
    """Z-Image with heads of 128; ComfyUI's detection fixes hidden and the refiners' blocks."""
    ffn, time, shapes = (
        -(-hidden * 8 // 3 // 256) * 256,
        min(hidden, 1024),
        {"x_pad_token": (1, hidden), "cap_pad_token": (1, hidden)},
    )
    _linear(shapes, "x_embedder", hidden, 64)
    _linear(shapes, "t_embedder.mlp.0", time, 256)
    _linear(shapes, "t_embedder.mlp.2", 256, time)
    shapes["cap_embedder.0.weight"] = (context,)
    _linear(shapes, "cap_embedder.1", hidden, context)
    for stem, blocks in (("noise_refiner", refiners), ("context_refiner", refiners), ("layers", depth)):
        for p in (f"{stem}.{b}." for b in range(blocks)):
            _linear(shapes, p + "attention.qkv", 3 * hidden, hidden, bias=False)
            _linear(shapes, p + "attention.out", hidden, hidden, bias=False)
            shapes |= {p + "attention.q_norm.weight": (128,), p + "attention.k_norm.weight": (128,)}
            for name, n, k in (("w1", ffn, hidden), ("w2", hidden, ffn), ("w3", ffn, hidden)):
                _linear(shapes, f"{p}feed_forward.{name}", n, k, bias=False)
            shapes |= {
                f"{p}{name}.weight": (hidden,)
                for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
            }
            if stem != "context_refiner":
                _linear(shapes, p + "adaLN_modulation.0", 4 * hidden, 256)
    _linear(shapes, "final_layer.linear", 64, hidden)
    _linear(shapes, "final_layer.adaLN_modulation.1", hidden, 256)
    return shapes


def sdxl_shapes(down=(0, 2, 5), middle=0, up=(0,) * 6, widths=(1, 1, 1)):
    """A U-Net of the SDXL kind: depths of the transformers of each residual block, in order; widths of the
    levels, in 320 channels.

    As it stands KOALA's way down, which ComfyUI detects, with none in the middle and on the way up. SDXL: (0,
    0, 2, 2, 10, 10), 10, (10, 10, 10, 2, 2, 2, 0, 0, 0), (1, 2, 4).
    """
    shapes, first, context, time = {}, 320, 2048, 1280
    each, width, skips, n = len(down) // len(widths), first, [first], 1

    def residual(p, k, n):
        _layer(shapes, p + "in_layers.0", (k,))
        _layer(shapes, p + "in_layers.2", (n, k, 3, 3))
        _linear(shapes, p + "emb_layers.1", n, time)
        _layer(shapes, p + "out_layers.0", (n,))
        _layer(shapes, p + "out_layers.3", (n, n, 3, 3))
        if k != n:
            _layer(shapes, p + "skip_connection", (n, k, 1, 1))

    def transformer(p, width, depth):
        _layer(shapes, p + "norm", (width,))
        _linear(shapes, p + "proj_in", width, width)
        _linear(shapes, p + "proj_out", width, width)
        for q in (f"{p}transformer_blocks.{b}." for b in range(depth)):
            for attention, k in (("attn1", width), ("attn2", context)):
                for name, inputs in (("to_q", width), ("to_k", k), ("to_v", k)):
                    _linear(shapes, f"{q}{attention}.{name}", width, inputs, bias=False)
                _linear(shapes, f"{q}{attention}.to_out.0", width, width)
            _linear(shapes, q + "ff.net.0.proj", 8 * width, width)
            _linear(shapes, q + "ff.net.2", width, 4 * width)
            for name in ("norm1", "norm2", "norm3"):
                _layer(shapes, q + name, (width,))

    _layer(shapes, "input_blocks.0.0", (first, 4, 3, 3))
    for name, k in (("time_embed.", first), ("label_emb.0.", 2816)):
        _linear(shapes, f"{name}0", time, k)
        _linear(shapes, f"{name}2", time, time)
    for level, scale in enumerate(widths):
        for depth in down[level * each : (level + 1) * each]:
            residual(f"input_blocks.{n}.0.", width, first * scale)
            width = first * scale
            if depth:
                transformer(f"input_blocks.{n}.1.", width, depth)
            skips.append(width)
            n += 1
        if level < len(widths) - 1:
            _layer(shapes, f"input_blocks.{n}.0.op", (width, width, 3, 3))
            skips.append(width)
            n += 1
    residual("middle_block.0.", width, width)
    if middle:
        transformer("middle_block.1.", width, middle)
        residual("middle_block.2.", width, width)
    for n, depth in enumerate(up):
        level, last = len(widths) - 1 - n // (each + 1), n % (each + 1) == each
        residual(f"output_blocks.{n}.0.", width + skips.pop(), first * widths[level])
        width = first * widths[level]
        if depth:
            transformer(f"output_blocks.{n}.1.", width, depth)
        if level and last:
            _layer(shapes, f"output_blocks.{n}.{2 if depth else 1}.conv", (width, width, 3, 3))
    _layer(shapes, "out.0", (first,))
    _layer(shapes, "out.2", (4, first, 3, 3))
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
    """Weights of variance gain^2 / K, small biases, unit norms: activations keep their size through the
    model."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for key, shape in shapes.items():
        if len(shape) == 1 and not key.endswith(".bias"):
            tensor = torch.ones(shape)
        elif len(shape) == 1:
            tensor = 0.01 * torch.randn(shape, generator=g)
        else:
            fan_in = shape[-1] if len(shape) == 3 else math.prod(shape[1:])  # of a table, of a layer
            tensor = torch.randn(shape, generator=g) * (gain / math.sqrt(fan_in))
        out[key] = tensor.to(dtype)
    return out


def save_random(path, shapes, seed=0, gain=0.7):
    save_file(random_state(shapes, seed, gain), path)
