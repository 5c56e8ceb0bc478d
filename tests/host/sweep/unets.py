"""Convolutional U-Nets with transformers in them, and Stable Cascade."""

from comfyui_nibble.tests.host.sweep.entry import Entry

_SD15 = {
    "use_checkpoint": False,
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}
_SD20 = _SD15 | {"use_linear_in_transformer": True, "context_dim": 1024}
_LABELLED = _SD20 | {"num_classes": "sequential"}
_SDXL = _LABELLED | {
    "adm_in_channels": 2816,
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "channel_mult": [1, 2, 4],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
}
_REFINER = _LABELLED | {
    "adm_in_channels": 2560,
    "model_channels": 384,
    "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
    "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
    "transformer_depth_middle": 4,
    "context_dim": 1280,
}
_SSD = _SDXL | {
    "transformer_depth": [0, 0, 2, 2, 4, 4],
    "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
    "transformer_depth_middle": -1,
}
_VEGA = _SSD | {
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
}
_KOALA = _SDXL | {
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [0, 2, 5],
    "transformer_depth_output": [0, 0, 2, 2, 5, 5],
    "transformer_depth_middle": -2,
}
_KOALA_1B = _KOALA | {
    "transformer_depth": [0, 2, 6],
    "transformer_depth_output": [0, 0, 2, 2, 6, 6],
    "transformer_depth_middle": 6,
}
_VIDEO = _LABELLED | {
    "adm_in_channels": 768,
    "in_channels": 8,
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1],
    "use_temporal_resblock": True,
    "use_temporal_attention": True,
    "disable_temporal_crossattention": False,
}

_SMALL = {
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "channel_mult": [1, 2],
    "transformer_depth_middle": 1,
    "context_dim": 64,
}
_EVERYWHERE = _SMALL | {
    "num_res_blocks": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "channel_mult": [1],
}
_HEADS = _EVERYWHERE | {"num_heads": 2}
_WITHOUT_MIDDLE = _SMALL | {"transformer_depth_middle": -1}
_POOLED = _SMALL | {"adm_in_channels": 6 * 256 + 64}
_SHORTENED = _POOLED | {"transformer_depth_middle": -1}
_SHORTEST = _POOLED | {"transformer_depth_middle": -2}
_LATENT = (1, 4, 16, 16)
_FRAMES = (2, 4, 16, 16)


def _pooled(rand):
    return {"pooled_output": rand(1, 64)}


ENTRIES = (
    Entry("SD15", _SD15, _HEADS, _LATENT),
    Entry("SD15_instructpix2pix", _SD15 | {"in_channels": 8}, _HEADS, _LATENT),
    Entry(
        "Stable_Zero123",
        _SD15 | {"in_channels": 8},
        _HEADS | {"context_dim": 768},
        _LATENT,
        text=(1, 772),
        outside={"cc_projection.weight": (768, 772), "cc_projection.bias": (768,)},
    ),
    Entry("SD20", _SD20, _EVERYWHERE, _LATENT),
    Entry(
        "SD21UnclipL", _LABELLED | {"adm_in_channels": 1536}, _EVERYWHERE | {"adm_in_channels": 64}, _LATENT
    ),
    Entry(
        "SD21UnclipH", _LABELLED | {"adm_in_channels": 2048}, _EVERYWHERE | {"adm_in_channels": 64}, _LATENT
    ),
    Entry(
        "SD_X4Upscaler",
        _SD20
        | {
            "in_channels": 7,
            "model_channels": 256,
            "num_classes": 1000,
            "channel_mult": [1, 2, 2, 4],
            "transformer_depth": [0, 0, 1, 1, 1, 1, 1, 1],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        },
        _HEADS | {"disable_self_attentions": [False]},
        _LATENT,
    ),
    Entry("LotusD", _LABELLED | {"adm_in_channels": 4}, _EVERYWHERE, _LATENT),
    Entry("SDXL", _SDXL, _POOLED, _LATENT, conds=_pooled),
    Entry("SDXL_instructpix2pix", _SDXL | {"in_channels": 8}, _POOLED, _LATENT, conds=_pooled, cosine=0.92),
    Entry("SDXLRefiner", _REFINER, _SMALL | {"adm_in_channels": 5 * 256 + 64}, _LATENT, conds=_pooled),
    Entry("SSD1B", _SSD, _SHORTENED, _LATENT, conds=_pooled, cosine=0.92),
    Entry("Segmind_Vega", _VEGA, _SHORTENED, _LATENT, conds=_pooled, cosine=0.92),
    Entry("KOALA_700M", _KOALA, _SHORTEST, _LATENT, conds=_pooled, cosine=0.92),
    Entry("KOALA_1B", _KOALA_1B, _POOLED, _LATENT, conds=_pooled, cosine=0.92),
    Entry("SVD_img2vid", _VIDEO, _EVERYWHERE, _FRAMES, text=(1, 64), cosine=0.92),
    Entry("SV3D_u", _VIDEO | {"adm_in_channels": 256}, _EVERYWHERE, _FRAMES, text=(1, 64)),
    Entry("SV3D_p", _VIDEO | {"adm_in_channels": 1280}, _EVERYWHERE, _FRAMES, text=(1, 64)),
    Entry(
        "Stable_Cascade_C",
        {"stable_cascade_stage": "c"},
        {
            "c_cond": 128,
            "c_hidden": [128, 128],
            "nhead": [2, 2],
            "blocks": [[1, 1], [1, 1]],
            "c_clip_text": 64,
            "c_clip_text_pooled": 64,
        },
        (1, 16, 8, 8),
        conds=_pooled,
    ),
    Entry(
        "Stable_Cascade_B",
        {
            "stable_cascade_stage": "b",
            "c_hidden": [320, 640, 1280, 1280],
            "nhead": [-1, -1, 20, 20],
            "blocks": [[2, 6, 28, 6], [6, 28, 6, 2]],
            "block_repeat": [[1, 1, 1, 1], [3, 3, 2, 2]],
        },
        {
            "c_cond": 128,
            "c_hidden": [64, 64, 128, 128],
            "nhead": [-1, -1, 2, 2],
            "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]],
            "block_repeat": [[1, 1, 1, 1], [1, 1, 1, 1]],
            "c_clip": 64,
        },
        (1, 4, 32, 32),
        conds=_pooled,
    ),
)
