"""The descriptions of a model that nunchaku's loaders read from a file's header, made from the model's
shapes."""

from ...store.safe import CheckpointError

HEAD = 128  # channels of an attention head, in all three


def configs(family: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict]:
    """{header entry: description}: "config", diffusers' arguments of the model class, and for FLUX.1
    "comfy_config", ComfyUI's, without which ComfyUI-nunchaku does not load it. shapes: {ComfyUI key: shape}.
    Raises CheckpointError where an embedder is missing or has other dimensions.
    """
    try:
        return _MAKERS[family](shapes)
    except KeyError as error:
        raise CheckpointError(
            f"nunchaku's description of the model needs the tensor {error}, found none: the model is not "
            "whole"
        ) from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"nunchaku's description of the model needs its embedders as matrices ({error}): it is damaged"
        ) from error


def _depth(shapes, stem) -> int:
    return len({key.split(".")[1] for key in shapes if key.startswith(f"{stem}.")})


def _flux(shapes):
    hidden, channels = shapes["img_in.weight"]
    out, guidance = shapes["final_layer.linear.weight"][0], "guidance_in.in_layer.weight" in shapes
    context, pooled = shapes["txt_in.weight"][1], shapes["vector_in.in_layer.weight"][1]
    double, single, axes = _depth(shapes, "double_blocks"), _depth(shapes, "single_blocks"), [16, 56, 56]
    config = {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": HEAD,
        "axes_dims_rope": axes,
        "guidance_embeds": guidance,
        "in_channels": channels,
        "joint_attention_dim": context,
        "num_attention_heads": hidden // HEAD,
        "num_layers": double,
        "num_single_layers": single,
        "out_channels": out,
        "patch_size": 1,
        "pooled_projection_dim": pooled,
    }
    comfy = {
        "axes_dim": axes,
        "context_in_dim": context,
        "depth": double,
        "depth_single_blocks": single,
        "disable_unet_model_creation": True,
        "guidance_embed": guidance,
        "hidden_size": hidden,
        "image_model": "flux",
        "in_channels": channels // 4,  # of a latent, whose patches of 2 x 2 are the model's tokens
        "mlp_ratio": 4.0,
        "num_heads": hidden // HEAD,
        "out_channels": out // 4,
        "patch_size": 2,
        "qkv_bias": True,
        "theta": 10000,
        "vec_in_dim": pooled,
    }
    return {
        "config": config,
        "comfy_config": {"model_class": "Flux" if guidance else "FluxSchnell", "model_config": comfy},
    }


def _qwen_image(shapes):
    hidden, channels = shapes["img_in.weight"]
    config = {
        "_class_name": "QwenImageTransformer2DModel",
        "attention_head_dim": HEAD,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": False,
        "in_channels": channels,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "num_attention_heads": hidden // HEAD,
        "num_layers": _depth(shapes, "transformer_blocks"),
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "patch_size": 2,
    }
    return {"config": config}


def _z_image(shapes):
    hidden, patch = shapes["x_embedder.weight"]
    config = {
        "_class_name": "ZImageTransformer2DModel",
        "all_f_patch_size": [1],
        "all_patch_size": [2],
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
        "dim": hidden,
        "in_channels": patch // 4,
        "n_heads": hidden // HEAD,
        "n_kv_heads": hidden // HEAD,
        "n_layers": _depth(shapes, "layers"),
        "n_refiner_layers": _depth(shapes, "noise_refiner"),
    }
    return {"config": config}


_MAKERS = {"flux": _flux, "qwen_image": _qwen_image, "z_image": _z_image}
