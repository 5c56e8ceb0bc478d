"""A relative of a mapped model (HuMo, a Wan that also hears; small and random): the rules take what it adds,
as a calibration observes it."""

import pytest
import torch

from comfyui_nibble.quant_core.calibration.observe import measured
from comfyui_nibble.quant_core.families import WAN
from comfyui_nibble.tests.support import relative_error

SOUND = [f"blocks.{i}.audio_cross_attn_wrapper.audio_cross_attn.{x}" for i in range(2) for x in "qkvo"]


def _noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module")
def humo(comfy, one_thread):
    """As ComfyUI loads it, of width 128 and 2 blocks."""
    import comfy.ops
    from comfy.ldm.wan.model import HumoWanModel

    torch.manual_seed(0)
    sizes = {"dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 2, "in_dim": 36, "text_dim": 4096}
    model = HumoWanModel(
        model_type="humo",
        **sizes,
        device="cpu",
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = p.ndim == 1 and "norm" in name and name.endswith("weight")
            p.fill_(1) if norm else p.normal_(std=0.7 * p[0].numel() ** -0.5 if p.ndim > 1 else 0.01)
    return comfy.sd.load_diffusion_model_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()})


@pytest.fixture(scope="module")
def calibration(humo, tmp_path_factory):
    import folder_paths

    from comfyui_nibble.nodes.calibrate import NibbleCalibrate

    folder_paths.set_output_directory(str(tmp_path_factory.mktemp("output")))
    heard = {"audio_embed": _noise(1, 3, 8, 5, 1280), "reference_latents": [_noise(1, 16, 1, 8, 8)]}
    latent = {"samples": torch.zeros(1, 16, 2, 8, 8)}
    with torch.inference_mode():
        return NibbleCalibrate.execute(
            humo,
            {"positive0": [[_noise(1, 10, 4096), heard]]},
            latent,
            "euler",
            "simple",
            2,
            1.0,
            0,
            2,
            1.0,
            True,
        ).args[0]


def test_the_calibration_observes_what_the_map_does_not_know(humo, calibration):
    from comfyui_nibble.nodes.host.source import ModelSource

    source = ModelSource(humo)
    assert source.family is WAN
    assert set(calibration.meta["observed"]["order"]) == {*SOUND, "time_projection.1"}
    plan = {layer.name: layer for layer in measured(source.layers, calibration)}
    assert {name for name, layer in plan.items() if layer.rule} == {*SOUND, "time_projection.1"}
    assert plan["blocks.1.audio_cross_attn_wrapper.audio_cross_attn.v"].input.endswith("audio_cross_attn.k")
    assert [layer.name for layer in plan.values() if layer.weight_only] == ["time_projection.1"]
    assert {layer.input for layer in plan.values()} <= set(calibration.names)
    # The map's own layers are as in a plain Wan, text to each block's keys and values from one set of
    # statistics.
    assert plan["blocks.1.cross_attn.v"].input == "blocks.0.cross_attn.k"


def test_they_are_quantized_with_the_rest(humo, calibration):
    from comfyui_nibble.nodes.host.build import ATTACHMENT
    from comfyui_nibble.nodes.quantize import NibbleQuantize
    from comfyui_nibble.tests.host.inside import load

    made = NibbleQuantize.execute(humo, "svdquant_r", 16, False, calibration).args[0]
    rows = {row["name"]: row for row in made.attachments[ATTACHMENT]["report"] if row["nbytes"]}
    assert {*SOUND, "time_projection.1"} <= set(rows)
    assert len(rows) == 2 * 10 + 9
    heard = {"audio_embed": _noise(1, 2, 8, 5, 1280), "reference_latent": _noise(1, 36, 1, 8, 8)}
    predict = lambda patcher: load(patcher).model.diffusion_model(
        _noise(1, 36, 2, 8, 8), torch.tensor([700.0]), _noise(1, 10, 4096), transformer_options={}, **heard
    )
    with torch.inference_mode():
        assert relative_error(predict(humo), predict(made)) < 0.15  # 0.09
