"""Video models beside Wan."""

from functools import partial
from types import SimpleNamespace

import torch

from comfyui_nibble.tests.host.sweep.entry import Entry

_HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "patch_size": [1, 2, 2],
    "out_channels": 16,
    "vec_in_dim": 768,
    "axes_dim": [16, 56, 56],
    "meanflow": False,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 20,
    "depth_single_blocks": 40,
    "theta": 256,
    "qkv_bias": True,
    "byt5": False,
    "guidance_embed": True,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
_REFINER = _HUNYUAN | {
    "in_channels": 128,
    "patch_size": [1, 1, 1],
    "out_channels": 64,
    "vec_in_dim": None,
    "context_in_dim": 3584,
    "guidance_embed": False,
}
_IMAGE21 = _REFINER | {
    "in_channels": 64,
    "patch_size": [1, 1],
    "axes_dim": [64, 64],
    "hidden_size": 3584,
    "num_heads": 28,
    "byt5": True,
}
_VIDEO15 = _REFINER | {
    "in_channels": 65,
    "out_channels": 32,
    "hidden_size": 2048,
    "num_heads": 16,
    "depth": 54,
    "depth_single_blocks": 0,
    "byt5": True,
    "use_cond_type_embedding": True,
    "vision_in_dim": 1152,
    "meanflow_sum": True,
}
_HUNYUAN_SMALL = {
    "hidden_size": 256,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 2,
    "context_in_dim": 64,
    "vec_in_dim": 64,
}
_NO_POOLED = _HUNYUAN_SMALL | {"vec_in_dim": None}
_COSMOS = {
    "image_model": "cosmos",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 4096,
    "block_config": "FA-CA-MLP",
    "concat_padding_mask": True,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": False,
    "pos_emb_interpolation": "crop",
    "block_x_format": "THWBD",
    "affline_emb_norm": True,
    "use_adaln_lora": True,
    "adaln_lora_dim": 256,
    "num_blocks": 28,
    "num_heads": 32,
    "extra_per_block_abs_pos_emb": True,
    "rope_h_extrapolation_ratio": 1.0,
    "rope_w_extrapolation_ratio": 1.0,
    "rope_t_extrapolation_ratio": 2.0,
    "extra_per_block_abs_pos_emb_type": "learnable",
}
_COSMOS_SMALL = {
    "model_channels": 256,
    "num_blocks": 2,
    "num_heads": 2,
    "adaln_lora_dim": 64,
    "crossattn_emb_channels": 64,
}
_PREDICT2 = {
    "image_model": "cosmos_predict2",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 2048,
    "concat_padding_mask": True,
    "crossattn_emb_channels": 1024,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop",
    "min_fps": 1,
    "max_fps": 30,
    "use_adaln_lora": True,
    "adaln_lora_dim": 256,
    "num_blocks": 28,
    "num_heads": 16,
    "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
    "extra_h_extrapolation_ratio": 1.0,
    "extra_w_extrapolation_ratio": 1.0,
    "extra_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}
_KANDINSKY = {
    "image_model": "kandinsky5",
    "model_dim": 1792,
    "axes_dims": (16, 24, 24),
    "time_dim": 512,
    "ff_dim": 7168,
    "visual_embed_dim": 132,
    "num_text_blocks": 2,
    "num_visual_blocks": 32,
}
_KANDINSKY_IMAGE = _KANDINSKY | {
    "model_dim": 2560,
    "axes_dims": (32, 48, 48),
    "rope_scale_factor": (1.0, 1.0, 1.0),
    "ff_dim": 10240,
    "visual_embed_dim": 64,
    "num_visual_blocks": 50,
}
_KANDINSKY_SMALL = {
    "model_dim": 256,
    "time_dim": 64,
    "ff_dim": 512,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "in_text_dim": 64,
    "in_text_dim2": 64,
}
_MOCHI = {
    "image_model": "mochi_preview",
    "depth": 48,
    "patch_size": 2,
    "num_heads": 24,
    "hidden_size_x": 3072,
    "hidden_size_y": 1536,
    "mlp_ratio_x": 4.0,
    "mlp_ratio_y": 4.0,
    "learn_sigma": False,
    "in_channels": 12,
    "qk_norm": True,
    "qkv_bias": False,
    "out_bias": True,
    "attn_drop": 0.0,
    "patch_embed_bias": True,
    "posenc_preserve_area": True,
    "timestep_mlp_bias": True,
    "attend_to_padding": False,
    "timestep_scale": 1000.0,
    "use_t5": True,
    "t5_feat_dim": 4096,
    "t5_token_length": 256,
    "rope_theta": 10000.0,
}
_COGVIDEO = {
    "image_model": "cogvideox",
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "time_embed_dim": 512,
    "num_layers": 42,
    "in_channels": 16,
    "patch_size": 2,
    "text_embed_dim": 4096,
    "use_learned_positional_embeddings": False,
    "use_rotary_positional_embeddings": True,
}
_COGVIDEO_SMALL = {"num_attention_heads": 2, "time_embed_dim": 64, "num_layers": 2, "text_embed_dim": 64}
_H3_SMALL = {
    "hidden_size": 256,
    "num_layers": 2,
    "token_refiner_num_layers": 1,
    "num_attention_heads": 2,
    "ffn_hidden_size": 512,
    "text_dim": 64,
    "time_embed_hidden_size": 256,
    "time_embed_dim": 128,
}
_SEEDVR2 = {
    "image_model": "seedvr2",
    "vid_dim": 2560,
    "heads": 20,
    "num_layers": 32,
    "norm_eps": 1e-5,
    "mlp_type": "swiglu",
    "vid_out_norm": True,
}
_VIDEO = (1, 16, 2, 8, 8)


def _glyphs(rand):
    return {"conditioning_byt5small": rand(1, 5, 1472)}


def _vision(rand):
    return (
        _glyphs(rand)
        | _pooled(rand)
        | {"clip_vision_output": SimpleNamespace(last_hidden_state=rand(1, 9, 1152))}
    )


def _pooled(rand):
    return {"pooled_output": rand(1, 64)}


def _frequencies(network):
    n = network.rope.inv_freq.numel()
    network.rope.inv_freq.copy_(10000.0 ** -(torch.arange(n) / n))


ENTRIES = (
    Entry("HunyuanVideo", _HUNYUAN, _HUNYUAN_SMALL, _VIDEO, conds=_pooled),
    Entry("HunyuanVideoI2V", _HUNYUAN | {"in_channels": 33}, _HUNYUAN_SMALL, _VIDEO, conds=_pooled),
    Entry("HunyuanVideoSkyreelsI2V", _HUNYUAN | {"in_channels": 32}, _HUNYUAN_SMALL, _VIDEO, conds=_pooled),
    Entry("HunyuanImage21", _IMAGE21, _NO_POOLED, (1, 64, 8, 8), conds=_glyphs),
    Entry("HunyuanImage21Refiner", _REFINER, _NO_POOLED, (1, 64, 2, 8, 8)),
    Entry(
        "HunyuanVideo15",
        _VIDEO15,
        _NO_POOLED | {"depth": 2, "depth_single_blocks": 0},
        (1, 32, 2, 8, 8),
        conds=_vision,
    ),
    Entry(
        "HunyuanVideo15_SR_Distilled",
        _VIDEO15 | {"in_channels": 98},
        _NO_POOLED | {"depth": 2, "depth_single_blocks": 0},
        (1, 32, 2, 8, 8),
        conds=_vision,
    ),
    Entry("CosmosT2V", _COSMOS, _COSMOS_SMALL, _VIDEO),
    Entry("CosmosI2V", _COSMOS | {"in_channels": 17}, _COSMOS_SMALL, _VIDEO),
    Entry("CosmosT2IPredict2", _PREDICT2, _COSMOS_SMALL, _VIDEO),
    Entry(
        "CosmosI2VPredict2",
        _PREDICT2 | {"in_channels": 17, "rope_h_extrapolation_ratio": 3.0, "rope_w_extrapolation_ratio": 3.0},
        _COSMOS_SMALL,
        _VIDEO,
    ),
    Entry(
        "Anima",
        _PREDICT2 | {"image_model": "anima"},
        _COSMOS_SMALL,
        (1, 16, 1, 8, 8),
        conds=lambda rand: {"t5xxl_ids": torch.arange(10), "t5xxl_weights": torch.ones(10)},
        replace={
            "comfy.ldm.anima.model.LLMAdapter": lambda made: partial(
                made, 64, 64, 128, num_layers=1, num_heads=2
            )
        },
    ),
    Entry("Kandinsky5", _KANDINSKY, _KANDINSKY_SMALL, _VIDEO, conds=_pooled),
    Entry("Kandinsky5Image", _KANDINSKY_IMAGE, _KANDINSKY_SMALL, (1, 16, 8, 8), conds=_pooled),
    Entry(
        "GenmoMochi",
        _MOCHI,
        {
            "depth": 2,
            "num_heads": 2,
            "hidden_size_x": 256,
            "hidden_size_y": 128,
            "mlp_ratio_x": 48.0,
            "t5_feat_dim": 64,
        },
        (1, 12, 2, 8, 8),
        conds=lambda rand: {"attention_mask": torch.ones(1, 10, dtype=torch.long)},
    ),
    Entry(
        "LTXV",
        {"image_model": "ltxv", "num_layers": 28, "attention_head_dim": 64, "cross_attention_dim": 2048},
        {"num_layers": 2, "num_attention_heads": 4, "cross_attention_dim": 256, "caption_channels": 64},
        (1, 128, 2, 4, 4),
        conds=lambda rand: {"attention_mask": torch.ones(1, 10, dtype=torch.long)},
    ),
    Entry(
        "LTXAV",
        {"image_model": "ltxav", "num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096},
        {
            "num_layers": 2,
            "num_attention_heads": 2,
            "cross_attention_dim": 256,
            "audio_num_attention_heads": 2,
            "audio_cross_attention_dim": 128,
            "caption_channels": 256,
            "connector_num_attention_heads": 2,
        },
        ((1, 128, 2, 4, 4), (1, 8, 8, 16)),
        text=(10, 256),
    ),
    Entry(
        "MiniMaxH3",
        {"image_model": "minimax_h3"},
        _H3_SMALL,
        ((1, 24, 2, 4, 4), (1, 32, 2, 8)),
        prepare=_frequencies,
    ),
    Entry(
        "SeedVR2",
        _SEEDVR2,
        {"vid_dim": 256, "heads": 2, "num_layers": 2, "mm_layers": 1, "txt_in_dim": 64},
        _VIDEO,
        conds=lambda rand: {"condition": rand(1, 17, 2, 8, 8)},
    ),
    Entry("CogVideoX_T2V", _COGVIDEO, _COGVIDEO_SMALL, _VIDEO),
    Entry("CogVideoX_I2V", _COGVIDEO | {"in_channels": 32}, _COGVIDEO_SMALL, _VIDEO),
    Entry("CogVideoX_Inpaint", _COGVIDEO | {"in_channels": 48}, _COGVIDEO_SMALL, _VIDEO),
)
