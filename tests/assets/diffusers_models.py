"""Small models of diffusers' own classes beside the same architecture's shapes in ComfyUI's key names."""

from comfyui_nibble.tests.assets.synthetic import (
    chroma_shapes,
    flux2_shapes,
    flux_shapes,
    qwen_image_shapes,
    sd3_shapes,
    sdxl_shapes,
    wan_shapes,
    z_image_shapes,
)

_WAN = {"num_attention_heads": 1, "attention_head_dim": 128, "ffn_dim": 256, "num_layers": 2}
_FLUX = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 64}
_FLUX2 = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 64}
_SD3 = {
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "num_layers": 3,
    "caption_projection_dim": 192,
    "qk_norm": "rms_norm",
}
# name: (family, class, its arguments, shapes in ComfyUI's names)
MODELS = {
    "flux dev": (
        "flux",
        "FluxTransformer2DModel",
        _FLUX | {"pooled_projection_dim": 32, "guidance_embeds": True},
        flux_shapes(2, 2, hidden=128, context=64, pooled=32),
    ),
    "flux schnell": (
        "flux",
        "FluxTransformer2DModel",
        _FLUX | {"pooled_projection_dim": 32},
        flux_shapes(2, 2, hidden=128, context=64, pooled=32, guidance=False),
    ),
    "flux fill": (
        "flux",
        "FluxTransformer2DModel",
        _FLUX
        | {"pooled_projection_dim": 32, "guidance_embeds": True, "in_channels": 384, "out_channels": 64},
        flux_shapes(2, 2, hidden=128, context=64, pooled=32, channels=384),
    ),
    "flux2 dev": ("flux2", "Flux2Transformer2DModel", _FLUX2, flux2_shapes(2, 2, hidden=128, context=64)),
    "flux2 klein": (
        "flux2",
        "Flux2Transformer2DModel",
        _FLUX2 | {"guidance_embeds": False},
        flux2_shapes(2, 2, hidden=128, context=64, guidance=False),
    ),
    "chroma": (
        "chroma",
        "ChromaTransformer2DModel",
        _FLUX
        | {
            "approximator_hidden_dim": 64,
            "num_layers": 19,
            "num_single_layers": 38,
        },  # ComfyUI counts on these depths
        chroma_shapes(19, 38, hidden=128, inner=64, context=64),
    ),
    "sd3.5": (
        "sd3",
        "SD3Transformer2DModel",
        _SD3 | {"dual_attention_layers": (0, 1), "pos_embed_max_size": 64, "sample_size": 64},
        sd3_shapes(3, twice=2),
    ),
    "qwen_image": (
        "qwen_image",
        "QwenImageTransformer2DModel",
        {"num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 64},
        qwen_image_shapes(2, hidden=128, context=64),
    ),
    "z_image": (
        "z_image",
        "ZImageTransformer2DModel",
        {
            "dim": 1152,
            "n_layers": 2,
            "n_refiner_layers": 2,
            "n_heads": 9,
            "n_kv_heads": 9,
            "cap_feat_dim": 64,
        },
        z_image_shapes(2, hidden=1152, context=64),
    ),
    "wan": ("wan", "WanTransformer3DModel", _WAN, wan_shapes(2)),
    "wan i2v": (
        "wan",
        "WanTransformer3DModel",
        _WAN | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 128},
        wan_shapes(2, channels=36, image=True),
    ),
    "wan vace": (
        "wan_vace",
        "WanVACETransformer3DModel",
        _WAN | {"vace_layers": [0, 1]},
        wan_shapes(2, vace=2),
    ),
    "sdxl": (
        "sdxl",
        "UNet2DConditionModel",
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        sdxl_shapes((0, 0, 2, 2, 10, 10), 10, (10, 10, 10, 2, 2, 2, 0, 0, 0), (1, 2, 4)),
    ),
}


def build(case):
    """diffusers' model on torch's default device."""
    import diffusers

    _, made, arguments, _ = MODELS[case]
    return getattr(diffusers, made)(**arguments)
