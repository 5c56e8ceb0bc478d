"""What a family's map knows beyond the rules of names and shapes, a calibration tells of models without a
map: shared inputs, outputs of a GELU, modulation. Models that people ask for most; those of SwiGLU have no
GELU to find."""

import pytest

from comfyui_nibble.quant_core.calibration.observe import measured
from comfyui_nibble.quant_core.families import GENERIC, detect
from comfyui_nibble.tests.host.sweep.flow import calibrate, replaced
from comfyui_nibble.tests.host.sweep.registry import ENTRIES
from comfyui_nibble.tests.host.sweep.tiny import make

FOUND = {  # of one block: {layer: the layer whose input it shares}, the layers after a GELU, the modulation
    "Krea2": (
        "blocks.0",
        {"attn.wk": "attn.wq", "attn.wv": "attn.wq", "attn.gate": "attn.wq", "mlp.up": "mlp.gate"},
        [],
        ["tproj.1"],
    ),
    "HunyuanVideo15": ("double_blocks.0", {}, ["img_mlp.2", "txt_mlp.2"], ["img_mod.lin", "txt_mod.lin"]),
    "LTXAV": (
        "transformer_blocks.0",
        {
            "attn1.to_k": "attn1.to_q",
            "attn1.to_v": "attn1.to_q",
            **{f"{a}.to_v": f"{a}.to_k" for a in ("attn2", "audio_attn2", "video_to_audio_attn")},
        },  # the tiny latent's sound is a token or two: its own layers count as modulation
        ["ff.net.2"],
        [],
    ),
    "Anima": (
        "blocks.0",
        {
            "self_attn.k_proj": "self_attn.q_proj",
            "self_attn.v_proj": "self_attn.q_proj",
            "cross_attn.v_proj": "cross_attn.k_proj",
        },
        ["mlp.layer2"],
        [f"adaln_modulation_{x}.{i}" for x in ("self_attn", "cross_attn", "mlp") for i in (1, 2)],
    ),
    "Ideogram4": ("layers.0", {"feed_forward.w3": "feed_forward.w1"}, [], ["adaln_modulation"]),
}


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.id in FOUND], ids=lambda e: e.id)
def test_a_calibration_finds_what_a_map_would_say(comfy, one_thread, outputs, entry):
    block, shared, after_gelu, modulation = FOUND[entry.id]
    with replaced(entry.replace):
        source = make(entry)
        calibration = calibrate(entry, source)
    shapes = {k: tuple(v.shape) for k, v in source.model.diffusion_model.state_dict().items()}
    assert detect(shapes) is GENERIC
    found = {x.name.removeprefix(f"{block}."): x for x in measured(GENERIC.layers(shapes), calibration)}
    inside = {name: x for name, x in found.items() if x.name.startswith(f"{block}.")}
    assert {
        n: x.input.removeprefix(f"{block}.")
        for n, x in inside.items()
        if x.input != x.name and not x.weight_only
    } == shared
    assert [n for n, x in inside.items() if any(p.after_gelu for p in x.parts)] == after_gelu
    assert all(found[n].weight_only for n in modulation)
