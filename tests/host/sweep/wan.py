"""Wan 2.1, 2.2 and what was built on them. The conditioning calls what a variant adds: audio, faces, poses,
cameras, a second branch."""

from types import SimpleNamespace

from comfyui_nibble.tests.host.sweep.entry import Entry

_14B = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 5120,
    "out_dim": 16,
    "num_heads": 40,
    "ffn_dim": 13824,
    "num_layers": 40,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "in_dim": 16,
}
_1_3B = _14B | {"dim": 1536, "num_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_5B = _14B | {"dim": 3072, "num_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_dim": 48, "out_dim": 48}
_SMALL = {"dim": 128, "num_heads": 1, "ffn_dim": 256, "num_layers": 2, "text_dim": 64}
_LATENT = (1, 16, 2, 8, 8)


def _14b(model_type, in_dim=16, **more):
    return _14B | {"model_type": model_type, "in_dim": in_dim} | more


def _seen(rand):
    """What CLIP Vision gives of a picture."""
    return SimpleNamespace(penultimate_hidden_states=rand(1, 9, 1280))


def _image(rand):
    return {"clip_vision_output": _seen(rand), "concat_latent_image": rand(*_LATENT)}


def _pose(rand):
    return {
        "pose_video_latent": rand(*_LATENT),
        "reference_latents": [rand(1, 16, 1, 8, 8)],
        "clip_vision_output": _seen(rand),
    }


def _pose_downscaled(rand):
    return _pose(rand) | {"pose_video_latent": rand(1, 16, 2, 4, 4)}


def _masks(rand):
    return _pose_downscaled(rand) | {
        "driving_mask_28ch": rand(1, 2, 28, 4, 4),
        "ref_mask_28ch": rand(1, 3, 28, 8, 8),
    }


def _speech(rand):
    return {
        "audio_embed": rand(1, 25, 1024, 16),
        "reference_latents": [rand(1, 16, 1, 8, 8)],
        "control_video": rand(*_LATENT),
        "reference_motion": rand(1, 16, 19, 8, 8),
    }


def _faces(rand):
    return _image(rand) | {
        "face_video_pixels": rand(1, 3, 4, 512, 512).clamp(-1, 1),
        "pose_video_latent": rand(1, 16, 1, 8, 8),
    }


def _music(rand):
    return _image(rand) | {"audio_embed": rand(1, 12, 35), "clip_vision_output_ref": _seen(rand)}


ENTRIES = (
    Entry("WAN21_T2V", _14B, _SMALL, _LATENT),
    Entry("WAN21_CausalAR_T2V", _1_3B, _SMALL, _LATENT),
    Entry("WAN22_T2V", _5B, _SMALL, (1, 48, 2, 8, 8)),
    Entry("WAN21_I2V", _14b("i2v", 36), _SMALL, _LATENT, conds=_image),
    Entry(
        "WAN21_FunControl2V",
        _14b("i2v", 48),
        _SMALL,
        _LATENT,
        conds=lambda rand: _image(rand) | {"concat_latent_image": rand(1, 32, 2, 8, 8)},
    ),
    Entry(
        "WAN21_Vace",
        _14b("vace", vace_in_dim=96, vace_layers=8),
        _SMALL | {"vace_layers": 1},
        _LATENT,
        conds=lambda rand: {"vace_frames": [rand(1, 32, 2, 8, 8)], "vace_mask": [rand(1, 64, 2, 8, 8)]},
    ),
    Entry(
        "WAN21_Camera",
        _14b("camera", 32),
        _SMALL,
        _LATENT,
        conds=lambda rand: _image(rand) | {"camera_conditions": rand(1, 24, 2, 64, 64)},
    ),
    Entry(
        "WAN22_Camera",
        _14b("camera_2.2", 36),
        _SMALL,
        _LATENT,
        conds=lambda rand: {"camera_conditions": rand(1, 24, 2, 64, 64)},
    ),
    Entry("WAN22_S2V", _14b("s2v"), _SMALL | {"audio_inject_layers": [0]}, _LATENT, conds=_speech),
    Entry(
        "WAN21_HuMo",
        _14b("humo", 36),
        _SMALL,
        _LATENT,
        conds=lambda rand: {
            "audio_embed": rand(1, 3, 8, 5, 1280),
            "reference_latents": [rand(1, 16, 1, 8, 8)],
        },
    ),
    Entry(
        "WAN22_Animate",
        _14b("animate", 36),
        _SMALL | {"num_layers": 5},
        _LATENT,
        conds=_faces,
        # The convolutions on a face take 512 x 512 pixels and 5 seconds, and are not quantized.
        replace={
            "comfy.ldm.wan.model_animate:Generator.get_motion": lambda made: (
                lambda self, faces: faces[:, 0, 0] * 8
            )
        },
    ),
    Entry(
        "WAN_Animate2",
        _14b("animate2", 36),
        _SMALL,
        _LATENT,
        conds=lambda rand: _image(rand) | {"pose_video_latent": rand(1, 16, 1, 8, 8)},
    ),
    Entry("WAN21_FlowRVS", _14b("flow_rvs"), _SMALL, _LATENT),
    Entry("WAN21_SCAIL", _14b("scail", 20), _SMALL, _LATENT, conds=_pose_downscaled),
    Entry("WAN21_SCAIL2", _14b("scail2", 20), _SMALL, _LATENT, conds=_masks),
    Entry(
        "WAN22_WanDancer", _14b("wandancer", 36), _SMALL | {"audio_inject_layers": [0]}, _LATENT, conds=_music
    ),
)
