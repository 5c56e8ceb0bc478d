"""Audio and 3D models."""

from functools import partial

import torch

from comfyui_nibble.tests.host.sweep.entry import Entry

_AUDIO = {
    "audio_model": "dit1.0",
    "global_cond_dim": 1536,
    "project_cond_tokens": False,
    "embed_dim": 1536,
    "num_heads": 24,
    "timestep_features_type": "learned",
    "io_channels": 64,
    "input_concat_dim": 0,
    "depth": 24,
}
_AUDIO3 = _AUDIO | {
    "global_cond_dim": 768,
    "attn_kwargs": {"qk_norm": "rms", "differential": False},
    "norm_type": "rms_norm",
    "timestep_features_type": "expo",
    "io_channels": 256,
    "local_add_cond_dim": 257,
    "global_cond_shared_embed": True,
    "global_cond_type": "adaLN",
}
_AUDIO_SMALL = {
    "embed_dim": 768,
    "num_heads": 12,
    "depth": 1,
}  # as wide as the text, of which ComfyUI fixes the width
_ACE = {
    "audio_model": "ace",
    "attention_head_dim": 128,
    "in_channels": 8,
    "inner_dim": 2560,
    "max_height": 16,
    "max_position": 32768,
    "max_width": 32768,
    "mlp_ratio": 2.5,
    "num_attention_heads": 20,
    "num_layers": 24,
    "out_channels": 8,
    "patch_size": [16, 1],
    "rope_theta": 1000000.0,
    "speaker_embedding_dim": 512,
    "text_embedding_dim": 768,
    "ssl_encoder_depths": [8, 8],
    "ssl_latent_dims": [1024, 768],
    "ssl_names": ["mert", "m-hubert"],
    "lyric_encoder_vocab_size": 6693,
    "lyric_hidden_size": 1024,
}
_ACE15_SMALL = {
    "hidden_size": 256,
    "text_hidden_dim": 64,
    "num_dit_layers": 2,
    "num_lyric_layers": 1,
    "num_timbre_layers": 1,
    "num_tokenizer_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 512,
    "fsq_dim": 256,
    "encoder_hidden_size": 256,
    "encoder_intermediate_size": 512,
    "encoder_num_heads": 2,
}
_HUNYUAN3D = {
    "image_model": "hunyuan3d2",
    "in_channels": 64,
    "context_in_dim": 1536,
    "hidden_size": 1024,
    "mlp_ratio": 4.0,
    "num_heads": 16,
    "depth": 16,
    "depth_single_blocks": 32,
    "qkv_bias": True,
    "guidance_embed": False,
}
_HUNYUAN3D_SMALL = {
    "context_in_dim": 64,
    "hidden_size": 256,
    "num_heads": 4,
    "depth": 1,
    "depth_single_blocks": 2,
}


def _seconds(name, width):
    """A number conditioner's tensors in the checkpoint; width: of its features, 257 where it has learned
    frequencies."""
    p = f"conditioner.conditioners.{name}.embedder.embedding."
    learned = {f"{p}0.weights": (128,)} if width == 257 else {}
    return learned | {f"{p}1.weight": (768, width), f"{p}1.bias": (768,)}


def _frequencies(network):
    n = network.transformer.rotary_pos_emb.inv_freq.numel()
    network.transformer.rotary_pos_emb.inv_freq.copy_(10000.0 ** -(torch.arange(n) / n))


def _music(network):
    transformer = network.diffusion_transformer.transformer
    n = transformer.rotary_pos_emb.inv_freq.numel()
    transformer.rotary_pos_emb.inv_freq.copy_(10000.0 ** -(torch.arange(n) / n))
    for module in network.modules():
        if hasattr(module, "beta"):
            module.beta.zero_()


def _voxels(count):
    """Coordinates (batch, x, y, z) of the first voxels of a grid."""
    at = torch.arange(count)
    return torch.stack([torch.zeros_like(at), at // 9, at // 3 % 3, at % 3], 1).int()


ENTRIES = (
    Entry(
        "StableAudio",
        _AUDIO,
        _AUDIO_SMALL,
        (1, 64, 16),
        text=(10, 768),
        outside=_seconds("seconds_start", 257) | _seconds("seconds_total", 257),
    ),
    Entry(
        "StableAudio3",
        _AUDIO3,
        _AUDIO_SMALL,
        (1, 256, 16),
        text=(10, 768),
        outside=_seconds("seconds_total", 256)
        | {"conditioner.conditioners.prompt.padding_embedding": (768,)},
        note="ComfyUI reads its widths off the checkpoint; the sizes here are for those of Stable Audio 1.",
    ),
    Entry(
        "ACEStep",
        _ACE,
        {
            "inner_dim": 256,
            "num_attention_heads": 2,
            "num_layers": 2,
            "text_embedding_dim": 64,
            "lyric_encoder_vocab_size": 128,
        },
        (1, 8, 16, 32),
        conds=lambda rand: {"conditioning_lyrics": torch.arange(8)[None]},
        replace={
            "comfy.ldm.ace.model.LyricEncoder": lambda made: partial(made, num_blocks=1, linear_units=256)
        },
    ),
    Entry(
        "ACEStep15",
        {"audio_model": "ace1.5"},
        _ACE15_SMALL,
        (1, 64, 20),
        conds=lambda rand: {"conditioning_lyrics": rand(1, 8, 64)},
        device="cpu",  # it computes with its buffers as it is made; weights stay memory that nothing touches
    ),
    Entry("Hunyuan3Dv2", _HUNYUAN3D, _HUNYUAN3D_SMALL, (1, 64, 32)),
    Entry(
        "Hunyuan3Dv2mini", _HUNYUAN3D | {"depth": 8, "depth_single_blocks": 16}, _HUNYUAN3D_SMALL, (1, 64, 32)
    ),
    Entry(
        "Hunyuan3Dv2_1",
        {
            "image_model": "hunyuan3d2_1",
            "in_channels": 64,
            "context_dim": 1024,
            "hidden_size": 2048,
            "mlp_ratio": 4.0,
            "num_heads": 16,
            "depth": 21,
            "qkv_bias": False,
            "guidance_cond_proj_dim": None,
        },
        {
            "context_dim": 64,
            "hidden_size": 256,
            "num_heads": 4,
            "depth": 3,
            "num_moe_layers": 1,
            "num_experts": 2,
            "moe_top_k": 1,
        },
        (1, 64, 32),
    ),
    Entry(
        "TripoSplat",
        {"image_model": "triposplat"},
        {
            "q_token_length": 32,
            "model_channels": 256,
            "cond_channels": 64,
            "num_blocks": 2,
            "num_refiner_blocks": 1,
        },
        ((1, 32, 16), (1, 1, 5)),
        conds=lambda rand: {"reference_latents": [rand(1, 128, 2, 2)]},
    ),
    Entry(
        "MiniMaxMusic3",
        {"audio_model": "minimax_music3"},
        {},
        (1, 128, 16),
        text=(8, 8 * 4096),
        conds=lambda rand: {"conditioning_scale": torch.ones(1, 1, 1)},
        prepare=_music,
        # Its widths are constants: one of 36 layers, with an MLP an eighth as wide.
        replace={
            "comfy.ldm.minimax_music.dit.range": lambda made: lambda n: made(1),
            "comfy.ldm.minimax_music.dit.TransformerBlock": lambda made: (
                lambda dim, heads, mlp, *rest: made(dim, heads, mlp // 8, *rest)
            ),
        },
    ),
    Entry(
        "Trellis2",
        {"image_model": "trellis2", "resolution": 64, "init_txt_model": True, "txt_only": False},
        {"model_channels": 128, "cond_channels": 64, "num_blocks": 1, "num_heads": 1},
        (1, 8, 16, 16, 16),
        conds=lambda rand: {"embeds": rand(1, 10, 64)},
        variant="structure",
        note="Nibble Calibrate sees the network of the stage that it samples; those of the other stages "
        "stay in 16 bit.",
    ),
    Entry(
        "Trellis2",
        {"image_model": "trellis2", "resolution": 64, "init_txt_model": True, "txt_only": False},
        {"model_channels": 256, "cond_channels": 64, "num_blocks": 2, "num_heads": 2},
        (1, 32, 24, 1),
        conds=lambda rand: {
            "embeds": rand(1, 10, 64),
            "trellis2_coords": _voxels(24),
            "trellis2_coord_counts": torch.tensor([24]),
            "trellis2_generation_mode": "shape_generation",
        },
        variant="shape",
    ),
)
