"""FLUX and what was built on its network: double and single blocks."""

import torch

from comfyui_nibble.tests.host.sweep.entry import Entry

_FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
    "yak_mlp": False,
    "txt_norm": False,
}
_SCHNELL = _FLUX | {"guidance_embed": False}
_LONGCAT = _SCHNELL | {
    "vec_in_dim": None,
    "context_in_dim": 3584,
    "txt_ids_dims": [1, 2],
    "depth": 10,
    "depth_single_blocks": 20,
}
_OVIS = _LONGCAT | {
    "context_in_dim": 2048,
    "yak_mlp": True,
    "txt_norm": True,
    "depth": 6,
    "depth_single_blocks": 27,
}
_FLUX2 = {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "vec_in_dim": None,
    "context_in_dim": 15360,
    "hidden_size": 6144,
    "mlp_ratio": 3.0,
    "num_heads": 48,
    "depth": 8,
    "depth_single_blocks": 48,
    "axes_dim": [32, 32, 32, 32],
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "ops_bias": False,
    "guidance_embed": True,
    "global_modulation": True,
    "mlp_silu_act": True,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    "txt_ids_dims": [3],
    "yak_mlp": False,
    "txt_norm": False,
}
_KLEIN = _FLUX2 | {
    "hidden_size": 3072,
    "num_heads": 24,
    "depth": 5,
    "depth_single_blocks": 20,
    "context_in_dim": 7680,
    "guidance_embed": False,
}
_CHROMA = {k: v for k, v in _FLUX.items() if k not in ("guidance_embed", "yak_mlp", "txt_norm")} | {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": None,
    "in_dim": 64,
    "out_dim": 3072,
    "hidden_dim": 5120,
    "n_layers": 5,
}
_RADIANCE = _CHROMA | {
    "image_model": "chroma_radiance",
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 16,
    "nerf_hidden_size": 64,
    "nerf_mlp_ratio": 4,
    "nerf_depth": 4,
    "nerf_max_freqs": 8,
    "nerf_tile_size": 512,
    "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32,
    "use_x0": False,
    "use_sequential_txt_ids": False,
}

_SMALL = {"hidden_size": 256, "num_heads": 2, "depth": 1, "depth_single_blocks": 2, "context_in_dim": 64}
_POOLED = _SMALL | {"vec_in_dim": 64}
_APPROXIMATED = _SMALL | {"out_dim": 256, "hidden_dim": 128}
_LATENT = (1, 16, 16, 16)


def _pooled(rand):
    return {"pooled_output": rand(1, 64), "guidance": 3.5}


ENTRIES = (
    Entry("Flux", _FLUX, _POOLED, _LATENT, conds=_pooled),
    Entry("FluxInpaint", _FLUX | {"in_channels": 96}, _POOLED, _LATENT, conds=_pooled),
    Entry("FluxSchnell", _SCHNELL, _POOLED, _LATENT, conds=_pooled),
    Entry("FluxSchnell", _OVIS, _SMALL, _LATENT, variant="Ovis"),
    Entry("LongCatImage", _LONGCAT, _SMALL, _LATENT),
    Entry("Flux2", _FLUX2, _SMALL, (1, 128, 8, 8), variant="dev"),
    Entry("Flux2", _KLEIN, _SMALL, (1, 128, 8, 8), variant="Klein 4B"),
    Entry("Chroma", _CHROMA, _APPROXIMATED, _LATENT),
    Entry("ChromaRadiance", _RADIANCE, _APPROXIMATED, (1, 3, 64, 64), gain=0.4),
)
