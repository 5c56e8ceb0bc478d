"""Small versions of models whose widths ComfyUI's detection fixes: a block of Qwen-Image as it is has 0.34 G
weights, minutes of a test."""


def widths_from_weights(detect_unet_config):
    """ComfyUI's function with these models' widths read off the weights; all else that it finds stays as it
    is."""

    def detect(state_dict, key_prefix, metadata=None):
        config = detect_unet_config(state_dict, key_prefix, metadata)
        widths = WIDTHS.get((config or {}).get("image_model"))
        return (
            config
            if widths is None
            else config | widths(lambda key: state_dict[key_prefix + key].shape, config)
        )

    return detect


def _chroma(shape, config):
    inner, width = shape("distilled_guidance_layer.in_proj.weight")
    return {"in_dim": width, "hidden_dim": inner, "out_dim": config["hidden_size"]}


def _qwen_image(shape, config):
    return {
        "num_attention_heads": shape("img_in.weight")[0] // 128,
        "joint_attention_dim": shape("txt_norm.weight")[0],
    }


def _z_image(shape, config):
    heads = config["dim"] // 128
    of_heads = {
        "n_heads": heads,
        "n_kv_heads": heads,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
    }
    fixed = {
        "ffn_dim_multiplier": 8 / 3,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    }
    return of_heads | fixed | _refiners(shape)


def _refiners(shape):
    try:
        shape("noise_refiner.1.attention.qkv.weight")
    except KeyError:
        return {"n_refiner_layers": 1}
    return {}


def _omnigen2(shape, config):
    width, count = shape("x_embedder.weight")[0], lambda stem: _count(shape, stem)
    heads = {
        "num_attention_heads": width // 120,
        "num_kv_heads": shape("layers.0.attn.to_k.weight")[0] // 120,
    }
    return heads | {
        "hidden_size": width,
        "num_layers": count("layers"),
        "num_refiner_layers": count("noise_refiner"),
        "text_feat_dim": shape("time_caption_embed.caption_embedder.0.weight")[0],
    }


def _pixart(shape, config):
    width = shape("x_embedder.proj.weight")[0]
    if width == config["hidden_size"]:
        return {}
    text = shape("y_embedder.y_proj.fc1.weight")[1]
    return {"hidden_size": width, "num_heads": width // 64, "caption_channels": text}


def _count(shape, stem):
    i = 0
    while True:
        try:
            shape(f"{stem}.{i}.attn.to_q.weight")
        except KeyError:
            return i
        i += 1


WIDTHS = {
    "omnigen2": _omnigen2,
    "chroma": _chroma,
    "qwen_image": _qwen_image,
    "lumina2": _z_image,
    "pixart_sigma": _pixart,
}
