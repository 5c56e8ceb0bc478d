"""LTX-2, small and random: latents, timesteps and predictions are pairs, of video and of sound."""

import hashlib
import json

import pytest
import torch

from comfyui_nibble.quant_core.calibration import Calibration
from comfyui_nibble.tests.host.inside import load, random_state

CONFIG = {
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "cross_attention_dim": 128,
    "caption_channels": 64,
}
CONFIG |= {"audio_num_attention_heads": 2, "audio_attention_head_dim": 32, "audio_cross_attention_dim": 64}
CONFIG |= {
    "connector_num_attention_heads": 4,
    "connector_attention_head_dim": 32,
    "audio_connector_attention_head_dim": 16,
    "connector_num_layers": 1,
}


@pytest.fixture(scope="module")
def ltxav(comfy, one_thread):
    import comfy.ops
    from comfy.ldm.lightricks.av_model import LTXAVModel

    network = LTXAVModel(**CONFIG, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    return comfy.sd.load_diffusion_model_state_dict(
        random_state(network), metadata={"config": json.dumps({"transformer": CONFIG})}
    )


def latent(sound=4, seed=0):
    from comfy.nested_tensor import NestedTensor

    g = torch.Generator().manual_seed(seed)
    return NestedTensor([torch.zeros(1, 128, 2, 4, 4), torch.randn(1, 8, sound, 16, generator=g)])


def calibrated(model, samples=2):
    from comfyui_nibble.nodes.calibrate import NibbleCalibrate

    prompt = torch.randn(1, 12, 128, generator=torch.Generator().manual_seed(1))
    latents = {"samples": latent()}
    return NibbleCalibrate.execute(
        model, {"positive0": [[prompt, {}]]}, latents, "euler", "simple", 3, 1.0, 0, samples, 1.0, True
    ).args[0]  # fmt: skip


def test_calibration(ltxav, outputs):
    """Statistics of both streams, and recorded calls on which the network predicts what it did."""
    network, predicted = ltxav.model.diffusion_model, []
    with network.register_forward_hook(lambda module, args, out: predicted.append(out[0].clone())):
        found = calibrated(ltxav)
    assert isinstance(found, Calibration)
    assert {"transformer_blocks.1.ff.net.2", "transformer_blocks.1.audio_ff.net.2"} <= set(found.names)
    calls = found.trajectory()
    assert len(calls) == 6
    assert [c.timestep for c in calls.calls[:3]] == sorted(
        {c.timestep for c in calls.calls[:3]}, reverse=True
    )  # falls from step to step
    (x, timestep), _ = calls.arguments(0)
    assert [t.shape for t in x] == [(1, 128, 2, 4, 4), (1, 8, 4, 16)]
    assert [float(t.max()) for t in timestep] == [calls.calls[0].timestep] * 2
    load(ltxav)
    with torch.no_grad():
        for index, want in enumerate(predicted[-6:]):
            assert torch.equal(calls.run(network, index), want)


def test_latents_of_both_tell_calibrations_apart(comfy):
    from comfyui_nibble.nodes.host.source import feed

    digests = set()
    for value in (latent(), latent(seed=1), latent(sound=5)):
        digest = hashlib.sha256()
        feed(digest, [value])
        digests.add(digest.hexdigest())
    assert len(digests) == 3
