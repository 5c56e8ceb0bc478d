"""What stands before or within a network's names in files of trainers and exporters; behind each the same
model is found, or nothing is made."""

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.prefixes import network
from comfyui_nibble.quant_core.store.safe import CheckpointError

pytestmark = pytest.mark.quick

BLOCK = ("double_blocks.0.", "double_blocks.0._orig_mod.")
BEFORE = [
    "", "model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "model.", "transformer.",
    "unet.", "module.", "_orig_mod.",
    "module._orig_mod.", "_orig_mod.module.model.diffusion_model.", "base_model.model.", "student.", "dit.",
    "module.transformer.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", BEFORE)
def test_the_network_behind_a_prefix(tmp_path, prefix, tiny_state):
    beside = (
        {"first_stage_model.x": torch.zeros(1), "v_pred": torch.empty(0)}
        if prefix == "model.diffusion_model."
        else {}
    )
    save_file({prefix + k: v for k, v in tiny_state.items()} | beside, tmp_path / "a.safetensors")
    found = Checkpoint(tmp_path / "a.safetensors")
    assert found.family.name == "flux"
    assert found.shapes == {k: tuple(v.shape) for k, v in tiny_state.items()}
    assert torch.equal(found.get("img_in.weight"), tiny_state["img_in.weight"])
    assert list(found.origin.beside) == (["v_pred"] if beside else [])


@pytest.mark.parametrize(
    "piece", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"]
)
def test_wrappers_within_names(tiny_state, piece):
    wrapped = [
        k.replace("double_blocks.0.", f"double_blocks.0.{piece}.").replace(".weight", f".{piece}.weight")
        for k in tiny_state
    ]
    assert network(wrapped, "x").keys == dict(zip(tiny_state, wrapped, strict=True))


def test_adapters_that_are_not_merged_are_refused(tiny_state):
    names = [k.replace("qkv.", "qkv.base_layer.") for k in tiny_state] + [
        "double_blocks.0.img_attn.qkv.lora_A.default.weight"
    ]
    with pytest.raises(
        CheckpointError,
        match=r"f.safetensors: holds an adapter beside.*first "
        r"double_blocks\.0\.img_attn\.qkv\.lora_A.*merge_and_unload",
    ):
        network(names, "f.safetensors")


def test_two_names_of_one_tensor_are_refused():
    with pytest.raises(CheckpointError, match=r"a\.b and a\._orig_mod\.b are the same tensor a\.b"):
        network(["a.b", "a._orig_mod.b"], "f")


UNKNOWN = [
    f"layers.{i}.{name}.weight" for i in range(3) for name in ("to_q", "to_k", "to_v", "ff.up", "ff.down")
] + [
    "embed.weight",
    "final.weight",
]


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "net.", "transformer.", "module.", "unet.", "core."]
)
def test_a_model_without_a_map(prefix):
    """Blocks of layers behind a prefix that is known; PixelDiT's `core` is a part of its names."""
    inside = {name if prefix != "core." else prefix + name: prefix + name for name in UNKNOWN}
    assert network([prefix + name for name in UNKNOWN], "f").keys == inside


STACKED = [
    "module.transformer.",
    "transformer.module.",
    "model.net.",
    "model.transformer.",
    "model.model.net.",
]
BESIDE = [
    "global_step",
    "ema.decay",
    "optimizer.0.exp_avg",
    "vae.decoder.0.weight",
    "text_encoders.t5.0.weight",
]


@pytest.mark.parametrize("prefix", STACKED)
@pytest.mark.parametrize("beside", [[], BESIDE], ids=["alone", "beside others"])
def test_prefixes_one_behind_the_other(prefix, beside):
    inside = {name: prefix + name for name in UNKNOWN}
    assert network([*inside.values(), *beside], "f").keys == inside


@pytest.mark.parametrize("prefix", ["", "module.", "model.model."])
def test_a_list_of_layers_that_is_called_as_a_prefix_is_a_part_of_the_names(prefix):
    """Stable Audio has its blocks under `transformer.`, and the embedder of its timesteps beside them."""
    inside = {f"transformer.{name}": f"{prefix}transformer.{name}" for name in UNKNOWN}
    inside |= {f"to_timestep_embed.{i}.weight": f"{prefix}to_timestep_embed.{i}.weight" for i in (0, 2)}
    assert network(inside.values(), "f").keys == inside


def test_an_unknown_prefix_of_a_mapped_model_is_found_beside_other_tensors(tiny_state):
    found = network([f"student.{name}" for name in tiny_state] + BESIDE, "f")
    assert found.keys == {name: f"student.{name}" for name in tiny_state}


def test_tensors_beside_a_network_do_not_hide_an_unknown_prefix():
    with pytest.raises(CheckpointError, match=r"the names of all 17 tensors begin with 'student\.'"):
        network([f"student.{name}" for name in UNKNOWN] + BESIDE, "f")


def test_a_model_without_a_map_behind_something_unknown_is_refused():
    """ComfyUI could not load what was made of it; quantizing takes minutes to hours."""
    with pytest.raises(
        CheckpointError,
        match=r"f: the names of all 17 tensors begin with 'ema\.'.*Save the network's own state dict",
    ):
        network([f"ema.{name}" for name in UNKNOWN], "f")
