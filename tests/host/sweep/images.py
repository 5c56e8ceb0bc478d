"""Image models with networks of their own."""

import torch

from comfyui_nibble.tests.host.sweep.entry import Entry

_SD3 = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": 38,
    "input_size": None,
    "adm_in_channels": 2048,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": 4096, "out_features": 2432},
    },
    "num_patches": 36864,
    "pos_embed_max_size": 192,
    "qk_norm": "rms",
    "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": [],
}
_SD3_SMALL = {
    "depth": 3,
    "adm_in_channels": 64,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": 64, "out_features": 192},
    },
    "num_patches": 256,
    "pos_embed_max_size": 16,
}
_PIXART = {
    "image_model": "pixart_sigma",
    "num_heads": 16,
    "patch_size": 2,
    "hidden_size": 1152,
    "in_channels": 4,
    "depth": 28,
    "model_max_length": 300,
    "input_size": 128,
    "pe_interpolation": 2,
    "micro_condition": False,
}
_PIXART_ALPHA = _PIXART | {"image_model": "pixart_alpha", "model_max_length": 120, "micro_condition": True}
_PIXART_SMALL = {"num_heads": 2, "hidden_size": 128, "depth": 2, "caption_channels": 64}
_HYDIT = {"image_model": "hydit", "depth": 40, "hidden_size": 1408, "mlp_ratio": 4.3637}
_HYDIT1 = _HYDIT | {"image_model": "hydit1", "size_cond": True, "use_style_cond": True}
_HYDIT_SMALL = {
    "depth": 4,
    "hidden_size": 256,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "text_states_dim": 64,
    "text_states_dim_t5": 128,
}
_LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 2304,
    "cap_feat_dim": 2304,
    "n_layers": 26,
    "qk_norm": True,
    "n_heads": 24,
    "n_kv_heads": 8,
    "axes_dims": [32, 32, 32],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 4.0,
}
_Z_IMAGE = _LUMINA | {
    "dim": 3840,
    "cap_feat_dim": 2560,
    "n_layers": 30,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
_Z_PIXEL = _Z_IMAGE | {
    "image_model": "zimage_pixel",
    "patch_size": 32,
    "in_channels": 3,
    "decoder_in_channels": 3072,
    "decoder_hidden_size": 3840,
    "decoder_num_res_blocks": 4,
    "decoder_max_freqs": 8,
}
_Z_SMALL = {
    "dim": 256,
    "cap_feat_dim": 64,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_refiner_layers": 1,
}
_QWEN = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}
_QWEN_SMALL = {"num_attention_heads": 2, "joint_attention_dim": 64, "num_layers": 2}
_LENS = {"image_model": "lens"}
_ERNIE_SMALL = {
    "hidden_size": 256,
    "num_attention_heads": 2,
    "num_layers": 2,
    "ffn_hidden_size": 512,
    "text_in_dim": 64,
}
_OMNIGEN = {
    "image_model": "omnigen2",
    "axes_dim_rope": [40, 40, 40],
    "axes_lens": [1024, 1664, 1664],
    "hidden_size": 2520,
    "in_channels": 16,
    "num_attention_heads": 21,
    "num_kv_heads": 7,
    "num_layers": 32,
    "num_refiner_layers": 2,
    "text_feat_dim": 2048,
    "timestep_scale": 1000.0,
}
_HIDREAM = {
    "image_model": "hidream",
    "attention_head_dim": 128,
    "axes_dims_rope": [64, 32, 32],
    "caption_channels": [4096, 4096],
    "max_resolution": [128, 128],
    "in_channels": 16,
    "llama_layers": [*range(32), *[31] * 16],
    "num_attention_heads": 20,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "num_layers": 16,
    "num_single_layers": 32,
    "out_channels": 16,
    "patch_size": 2,
    "text_emb_dim": 2048,
}
_PIXELDIT_SMALL = {
    "hidden_size": 256,
    "num_groups": 4,
    "pixel_attn_hidden_size": 128,
    "pixel_num_groups": 2,
    "patch_depth": 2,
    "pixel_depth": 1,
    "txt_embed_dim": 64,
}
_LQ = {"lq_latent_channels": 16, "lq_hidden_dim": 512, "lq_interval": 2}
_PID = {"image_model": "pid", "latent_spatial_down_factor": 8} | _LQ


def _masked(rand):
    return {"attention_mask": torch.ones(1, 10, dtype=torch.long)}


def _zero_centred(network):
    """Its norms multiply by 1 + scale."""
    for module in network.modules():
        if type(module).__name__ == "RMSNorm":
            module.scale.zero_()


ENTRIES = (
    Entry("SD3", _SD3, _SD3_SMALL, (1, 16, 16, 16), conds=lambda rand: {"pooled_output": rand(1, 64)}),
    Entry(
        "AuraFlow",
        {"max_seq": 9216, "cond_seq_dim": 2048, "n_double_layers": 4, "n_layers": 36},
        {
            "max_seq": 64,
            "cond_seq_dim": 64,
            "n_double_layers": 1,
            "n_layers": 3,
            "dim": 256,
            "n_heads": 2,
            "global_conddim": 256,
        },
        (1, 4, 16, 16),
    ),
    Entry(
        "PixArtAlpha",
        _PIXART_ALPHA,
        _PIXART_SMALL | {"hidden_size": 192},
        (1, 4, 36, 36),
        conds=lambda rand: {"width": 128, "height": 128},
    ),
    Entry("PixArtSigma", _PIXART, _PIXART_SMALL, (1, 4, 36, 36)),
    Entry(
        "HunyuanDiT",
        _HYDIT,
        _HYDIT_SMALL,
        (1, 4, 16, 16),
        text=(77, 64),
        conds=lambda rand: {
            "conditioning_mt5xl": rand(1, 256, 128),
            "attention_mask": rand(1, 77) > 0,
            "attention_mask_mt5xl": rand(1, 256) > 0,
        },
    ),
    Entry(
        "HunyuanDiT1",
        _HYDIT1,
        _HYDIT_SMALL,
        (1, 4, 16, 16),
        text=(77, 64),
        conds=lambda rand: {
            "conditioning_mt5xl": rand(1, 256, 128),
            "attention_mask": rand(1, 77) > 0,
            "attention_mask_mt5xl": rand(1, 256) > 0,
        },
    ),
    Entry(
        "Lumina2",
        _LUMINA,
        {"dim": 192, "cap_feat_dim": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "n_refiner_layers": 1},
        (1, 16, 16, 16),
    ),
    Entry("ZImage", _Z_IMAGE, _Z_SMALL, (1, 16, 16, 16)),
    Entry(
        "ZImagePixelSpace",
        _Z_PIXEL,
        _Z_SMALL | {"decoder_hidden_size": 256, "decoder_num_res_blocks": 2},
        (1, 3, 64, 64),
    ),
    Entry("QwenImage", _QWEN, _QWEN_SMALL, (1, 16, 1, 16, 16)),
    Entry(
        "QwenImage",
        _QWEN | {"default_ref_method": "index_timestep_zero"},
        _QWEN_SMALL,
        (1, 16, 1, 16, 16),
        conds=lambda rand: {"reference_latents": [rand(1, 16, 1, 8, 8)]},
        variant="Edit 2511",
    ),
    Entry(
        "QwenImage",
        _QWEN | {"use_additional_t_cond": True, "default_ref_method": "negative_index"},
        _QWEN_SMALL,
        (1, 16, 2, 16, 16),
        conds=lambda rand: {"reference_latents": [rand(1, 16, 1, 8, 8)]},
        variant="Layered",
    ),
    Entry(
        "MageFlow",
        {"image_model": "mage_flow", "in_channels": 128, "num_layers": 12},
        _QWEN_SMALL,
        (1, 128, 8, 8),
    ),
    Entry(
        "JoyImage",
        {
            "image_model": "joyimage",
            "in_channels": 16,
            "hidden_size": 3072,
            "patch_size": [1, 2, 2],
            "num_layers": 20,
            "num_attention_heads": 24,
            "text_dim": 4096,
        },
        {"hidden_size": 256, "num_attention_heads": 2, "num_layers": 2, "text_dim": 64},
        (1, 16, 1, 16, 16),
    ),
    Entry(
        "Ideogram4",
        {"image_model": "ideogram4", "in_channels": 128, "num_layers": 34},
        {
            "num_attention_heads": 1,
            "num_layers": 2,
            "intermediate_size": 512,
            "adaln_dim": 128,
            "llm_features_dim": 64,
        },
        (1, 128, 8, 8),
    ),
    Entry(
        "Krea2",
        {
            "image_model": "krea2",
            "features": 6144,
            "channels": 16,
            "patch": 2,
            "layers": 28,
            "heads": 48,
            "kvheads": 12,
            "txtlayers": 12,
            "txtdim": 2560,
        },
        {
            "features": 256,
            "layers": 2,
            "heads": 2,
            "kvheads": 1,
            "txtlayers": 2,
            "txtdim": 128,
            "txtheads": 2,
            "txtkvheads": 2,
        },
        (1, 16, 16, 16),
        text=(10, 256),
        prepare=_zero_centred,
    ),
    Entry(
        "Lens",
        _LENS,
        {"num_layers": 2, "num_attention_heads": 4, "enc_hidden_dim": 64, "selected_layer_index": (0, 1)},
        (1, 128, 8, 8),
        text=(10, 128),
    ),
    Entry("ErnieImage", {"image_model": "ernie"}, _ERNIE_SMALL, (1, 128, 8, 8)),
    Entry(
        "Omnigen2",
        _OMNIGEN,
        {
            "hidden_size": 240,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "text_feat_dim": 64,
        },
        (1, 16, 16, 16),
        conds=_masked,
    ),
    Entry(
        "Boogu",
        {
            "image_model": "boogu",
            "hidden_size": 3360,
            "num_layers": 32,
            "num_double_stream_layers": 8,
            "num_refiner_layers": 2,
            "instruction_feat_dim": 4096,
        },
        {
            "hidden_size": 240,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "num_layers": 1,
            "num_double_stream_layers": 1,
            "num_refiner_layers": 1,
            "instruction_feat_dim": 64,
        },
        (1, 16, 16, 16),
        conds=_masked,
    ),
    Entry(
        "HiDream",
        _HIDREAM,
        {
            "caption_channels": [64, 64],
            "llama_layers": [0, 1],
            "num_attention_heads": 2,
            "num_layers": 1,
            "num_single_layers": 1,
            "text_emb_dim": 64,
        },
        (1, 16, 16, 16),
        conds=lambda rand: {"pooled_output": rand(1, 64), "conditioning_llama3": rand(1, 2, 10, 64)},
    ),
    Entry(
        "HiDreamO1",
        {"image_model": "hidream_o1"},
        {
            "text_config_overrides": {
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 1,
                "num_key_value_heads": 1,
            },
            "vision_config_overrides": {
                "hidden_size": 128,
                "num_heads": 2,
                "intermediate_size": 256,
                "depth": 2,
            },
        },
        (1, 3, 64, 64),
        conds=lambda rand: {
            "text_input_ids": torch.tensor(
                [[151644, 872, 198, 11, 12, 13, 151645, 151673]]
            ),  # <|im_start|>user\n ... <|tms_token|>
            "reference_latents": [rand(1, 64, 64, 3).clamp(0, 1)],
        },
        note="Its tower for reference images is quantized where the calibration samples with one.",
    ),
    Entry("PixelDiTT2I", {"image_model": "pixeldit_t2i"}, _PIXELDIT_SMALL, (1, 3, 64, 64)),
    Entry(
        "PiD",
        _PID,
        _PIXELDIT_SMALL | {"lq_hidden_dim": 64, "lq_num_res_blocks": 1},
        (1, 3, 64, 64),
        conds=lambda rand: {"lq_latent": rand(1, 16, 2, 2), "degrade_sigma": rand(1).abs()},
    ),
)
