"""The maps from diffusers' names against ComfyUI: its own conversion tables, and the same prediction from the
same weights."""

import pytest
import torch

from comfyui_nibble.quant_core.families import by_name
from comfyui_nibble.tests.assets.diffusers_models import MODELS, build
from comfyui_nibble.tests.assets.synthetic import random_state
from comfyui_nibble.tests.host.narrow import widths_from_weights
from comfyui_nibble.tests.support import relative_error


def table_of(utils, case):
    """ComfyUI's own table {diffusers' key: ComfyUI's, or (ComfyUI's, (0, first row, rows), a function)}."""
    kind, hidden = case.split()[0], MODELS[case][3]
    if kind == "flux":
        return utils.flux_to_diffusers({"depth": 2, "depth_single_blocks": 2, "hidden_size": 128})
    if kind == "sd3.5":
        return utils.mmdit_to_diffusers({"depth": 3})
    if kind == "z_image":
        return utils.z_image_to_diffusers({"n_layers": 2, "dim": hidden["x_embedder.weight"][0]})
    depths = {
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    }
    return utils.unet_to_diffusers(
        {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth_middle": 10} | depths
    )


@pytest.mark.parametrize("case", ["flux dev", "sd3.5", "z_image", "sdxl"])
def test_the_map_is_comfyuis_own(comfy, case):
    with torch.device("meta"):
        theirs = {k: tuple(v.shape) for k, v in build(case).state_dict().items()}
    table, seen = table_of(comfy.utils, case), 0
    for key, stacked in by_name(MODELS[case][0]).diffusers(theirs).items():
        edge = 0
        for other in stacked.keys:
            found = table[other] if isinstance(table[other], tuple) else (table[other],)
            assert found[0].replace("_norm.weight", "_norm.scale") == key.replace(
                "_norm.weight", "_norm.scale"
            )
            if len(found) > 1 and found[1] is not None:
                assert found[1][1] == edge
            assert (len(found) > 2) == stacked.swap_halves
            edge += theirs[other][0]
            seen += 1
    assert seen == len(theirs)


def _noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _patches(x):
    """(1, C, H, W) -> (1, H W / 4, 4 C), channels first in a patch."""
    return x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def _ids(side):
    grid = torch.zeros(side, side, 3)
    grid[..., 1], grid[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
    return grid.flatten(0, 1)


_TEXT, _TIME = _noise(1, 7, 64), torch.tensor([0.7])


def wan(theirs, ours):
    x, text, seen, t = (
        _noise(1, 36, 2, 8, 8),
        _noise(1, 512, 4096),
        _noise(1, 257, 1280),
        torch.tensor([700.0]),
    )
    return (
        theirs(x, t, text, encoder_hidden_states_image=seen, return_dict=False)[0],
        ours(x, t, context=text, clip_fea=seen, transformer_options={}),
    )


def wan_vace(theirs, ours):
    x, text, seen, t = (
        _noise(1, 16, 2, 8, 8),
        _noise(1, 512, 4096),
        _noise(1, 96, 2, 8, 8),
        torch.tensor([700.0]),
    )
    return (
        theirs(
            x,
            t,
            text,
            control_hidden_states=seen,
            control_hidden_states_scale=torch.ones(2),
            return_dict=False,
        )[0],
        ours(x, t, context=text, vace_context=seen[:, None], vace_strength=[1.0], transformer_options={}),
    )


def chroma(theirs, ours):
    x = _noise(1, 16, 8, 8)
    mask = torch.ones(1, 7 + 16, dtype=torch.bool)
    out = theirs(
        _patches(x),
        _TEXT,
        timestep=_TIME,
        img_ids=_ids(4),
        txt_ids=torch.zeros(7, 3),
        attention_mask=mask,
        return_dict=False,
    )
    return out[0], _patches(ours(x, _TIME, context=_TEXT, guidance=torch.zeros(1), transformer_options={}))


def qwen_image(theirs, ours):
    x = _noise(1, 16, 8, 8)
    mask = torch.ones(1, 7)
    out = theirs(_patches(x), _TEXT, mask, _TIME, img_shapes=[[(1, 4, 4)]], return_dict=False)
    return out[0], _patches(ours(x[:, :, None], _TIME, context=_TEXT, transformer_options={})[:, :, 0])


def sd3(theirs, ours):
    x, text, pooled, t = _noise(1, 16, 8, 8), _noise(1, 7, 4096), _noise(1, 2048), torch.tensor([700.0])
    return theirs(x, text, pooled, t, return_dict=False)[0], ours(
        x, t, context=text, y=pooled, transformer_options={}
    )


def flux2(theirs, ours):
    """Latents come in patches already; the text's tokens count along the fourth axis of the positions."""
    x, guidance = _noise(1, 128, 4, 4), torch.tensor([3.5])
    ids, text_ids = torch.zeros(16, 4), torch.zeros(7, 4)
    ids[:, 1:3], text_ids[:, 3] = _ids(4)[:, 1:], torch.arange(7)
    tokens = x.flatten(2).mT
    out = theirs(
        tokens, _TEXT, timestep=_TIME, img_ids=ids, txt_ids=text_ids, guidance=guidance, return_dict=False
    )[0]
    return out, ours(x, _TIME, context=_TEXT, guidance=guidance, transformer_options={}).flatten(2).mT


PREDICT = {
    "flux2 dev": flux2,
    "wan i2v": wan,
    "wan vace": wan_vace,
    "chroma": chroma,
    "qwen_image": qwen_image,
    "sd3.5": sd3,
}


@pytest.mark.parametrize("case", PREDICT)
def test_the_same_weights_predict_the_same(comfy, monkeypatch, one_thread, case):
    """Where ComfyUI has no table, or as well: names of equal shape that change places would not show in
    shapes."""
    import comfy.model_detection as detection

    monkeypatch.setattr(detection, "detect_unet_config", widths_from_weights(detection.detect_unet_config))
    theirs = build(case).eval()
    state = random_state({k: tuple(v.shape) for k, v in theirs.state_dict().items()}, dtype=torch.float32)
    theirs.load_state_dict(state)
    mapped = by_name(MODELS[case][0]).diffusers({k: tuple(v.shape) for k, v in state.items()})
    converted = {key: stacked.read(state.__getitem__) for key, stacked in mapped.items()}
    config = detection.model_config_from_unet(converted, "")
    config.set_inference_dtype(torch.float32, None)
    ours = config.get_model(converted, "", device="cpu").diffusion_model
    ours.load_state_dict(config.process_unet_state_dict(converted))
    with torch.inference_mode():
        want, got = PREDICT[case](theirs, ours)
    assert relative_error(want, got) < 1e-4
