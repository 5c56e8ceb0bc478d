"""Omnigen2, small and random: 360 in-channels where it has 2520, neither of which 64 divides. Calibrated,
quantized, saved, loaded, with LoRA."""

import pytest
import torch

from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.tests.host.inside import attached_weight, load, module, packed_hash, random_state
from comfyui_nibble.tests.host.narrow import widths_from_weights
from comfyui_nibble.tests.host.test_adapters import randn, with_lora
from comfyui_nibble.tests.support import relative_error

WIDTH, WHOLE = 360, 384
PADDED = "diffusion_model.layers.1.attn.to_v"  # (120, 360)


@pytest.fixture(scope="module")
def omnigen2(comfy, one_thread):
    import comfy.model_detection
    import comfy.ops
    from comfy.ldm.omnigen.omnigen2 import OmniGen2Transformer2DModel

    network = OmniGen2Transformer2DModel(
        hidden_size=WIDTH, num_layers=2, num_refiner_layers=2, num_attention_heads=3, num_kv_heads=1,
        axes_dim_rope=(40, 40, 40),
        axes_lens=(1024, 1664, 1664), text_feat_dim=64, timestep_scale=1000.0,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    detect = comfy.model_detection.detect_unet_config
    comfy.model_detection.detect_unet_config = widths_from_weights(detect)
    yield comfy.sd.load_diffusion_model_state_dict(random_state(network))
    comfy.model_detection.detect_unet_config = detect


def predicted(patcher):
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 16, 8, 8, generator=g), torch.randn(1, 12, 64, generator=g)
    with torch.no_grad():
        return load(patcher).model.diffusion_model(x, torch.tensor([0.7]), context, num_tokens=12)


@pytest.fixture
def packed(omnigen2, outputs):
    from comfyui_nibble.nodes.calibrate import NibbleCalibrate
    from comfyui_nibble.nodes.quantize import NibbleQuantize

    prompt = [[randn(1, 12, 64, seed=3) * 10, {"attention_mask": torch.ones(1, 12).long()}]]
    found = NibbleCalibrate.execute(
        omnigen2, {"positive0": prompt}, {"samples": torch.zeros(1, 16, 8, 8)}, "euler", "simple", 3, 1.0, 0,
        4, 1.0, True
    ).args[0]  # fmt: skip
    assert found.get("layers.1.attn.to_q", second_moments=True).blocks == ((0, WIDTH),)
    made, report, _ = NibbleQuantize.execute(omnigen2, "svdquant_r", 16, True, found).args
    assert f"padded to {WHOLE} channels" in report
    return made


def test_main_job(omnigen2, packed):
    """Every linear layer of the blocks is quantized, and those with 360 in-channels are padded."""
    from comfyui_nibble.nodes.files import NibbleSaveModel
    from comfyui_nibble.nodes.host.build import load as load_file

    layers = {n.removeprefix("diffusion_model."): m for n, m in packed.packed_layers()}
    network = omnigen2.model.diffusion_model
    wanted = {f"{name}.{leaf}" for name in ("layers.0", "layers.1", "noise_refiner.1", "context_refiner.1")
              for leaf in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "feed_forward.linear_1",
              "feed_forward.linear_2", "feed_forward.linear_3")}  # fmt: skip
    assert wanted <= set(layers)
    for name in wanted:
        assert (layers[name].in_features, layers[name].out_features) == network.get_submodule(
            name
        ).weight.shape[::-1]
        assert layers[name].spec.padding == (WHOLE - WIDTH if layers[name].in_features == WIDTH else 0)
    want, got = predicted(omnigen2), predicted(packed)
    assert relative_error(want, got) < 0.15
    path = NibbleSaveModel.execute(packed, "diffusion_models/omnigen2").args[0]
    assert PackFile(path).logical_shapes()["layers.0.attn.to_q.weight"] == (WIDTH, WIDTH)
    assert torch.equal(predicted(load_file(path)), got)


def test_lora(omnigen2, packed):
    """A LoRA and a full difference of 360 channels on padded layers: beside W as ComfyUI merges them, the
    packed bytes unchanged."""
    import comfy.lora

    up, down, before = randn(120, 4), randn(4, WIDTH), packed_hash(packed)
    for file in (
        {f"{PADDED}.lora_up.weight": up, f"{PADDED}.lora_down.weight": down},
        {f"{PADDED}.diff": up @ down * 0.1},
    ):
        patched = load(with_lora(packed, file))
        layer = module(patched, PADDED)
        merged = comfy.lora.calculate_weight(
            patched.patches[f"{PADDED}.weight"], layer.layer().dequantize(), PADDED
        )
        assert relative_error(merged, attached_weight(layer)) < 5e-7
        x = randn(5, WIDTH)
        want = layer.layer()(x) + x @ (merged - layer.layer().dequantize()).T
        assert relative_error(want, layer(x)) < 1e-6
        assert packed_hash(patched) == before
    strong = {f"{PADDED}.lora_up.weight": up * 20, f"{PADDED}.lora_down.weight": down}
    effects = [predicted(with_lora(model, strong)) - predicted(model) for model in (omnigen2, packed)]
    assert (
        float(torch.nn.functional.cosine_similarity(*(e.flatten() for e in effects), dim=0)) > 0.9
    )  # 0.935 measured
