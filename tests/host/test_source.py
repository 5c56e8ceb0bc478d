"""What is on the MODEL in front of Nibble Quantize: it is in the weights that are quantized, or refused by
name before any work."""

import logging

import pytest
import torch

from comfyui_nibble.tests.host.inside import forward, sample
from comfyui_nibble.tests.host.test_adapters import (
    KINDS,
    LINEAR2,
    MLP,
    MODULATION,
    QKV,
    SHAPES,
    H,
    adapter,
    randn,
    with_lora,
)
from comfyui_nibble.tests.support import relative_error

PREFIX = "diffusion_model."
IN, FINAL = f"{PREFIX}img_in", f"{PREFIX}final_layer.linear"


@pytest.fixture(scope="module")
def source_of(comfy, one_thread):
    from comfyui_nibble.nodes.host.source import ModelSource

    return ModelSource


@pytest.fixture
def refused(comfy):
    from comfyui_nibble.nodes.host.inherited import NotInheritable

    return NotInheritable


@pytest.fixture
def misfit(comfy):
    from comfyui_nibble.nodes.host.source import MisfitPatch

    return MisfitPatch


def bypassed(patcher, tensors, strength=1.0):
    """What LoraLoaderBypassModelOnly does."""
    import comfy.sd

    return comfy.sd.load_bypass_lora_for_models(patcher, None, dict(tensors), strength, 0)[0]


def weight(source, key, leaf="weight"):
    return source.get(f"{key.removeprefix(PREFIX)}.{leaf}")


def stock_weight(patcher, key):
    """The weight that ComfyUI samples with."""
    return patcher.patch_weight_to_device(f"{key}.weight", device_to=torch.device("cpu"), return_weight=True)


def quantize(model, monkeypatch, tmp_path, calibration=None):
    import folder_paths

    from comfyui_nibble.nodes.quantize import NibbleQuantize

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    with torch.inference_mode():
        return NibbleQuantize.execute(model, "rtn", 0, False, calibration).args[0]


def codes(patcher):
    return {name: m.weight.detach() for name, m in patcher.packed_layers()}


# -- patches


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_patch_is_merged_as_comfyui_merges_it(full, source_of, kind):
    for key in (QKV, LINEAR2):
        patched = with_lora(full, adapter(kind, key), 0.7)
        assert relative_error(stock_weight(patched, key), weight(source_of(patched), key)) < 1e-6
        assert relative_error(weight(source_of(full), key), weight(source_of(patched), key)) > 1e-3


def test_patches_that_only_scale_are_merged(full, source_of):
    patched = full.clone()
    patched.add_patches({f"{QKV}.weight": (None,)}, 0.0, 0.25)
    assert torch.equal(weight(source_of(patched), QKV), 0.25 * weight(source_of(full), QKV))


def test_a_merge_with_another_model_counts(comfy, full, source_of, tiny_state):
    other = comfy.sd.load_diffusion_model_state_dict({k: 2 * v for k, v in tiny_state.items()})
    merged = full.clone()
    for key, patch in other.get_key_patches(PREFIX).items():
        merged.add_patches({key: patch}, 0.25, 0.75)
    source, base = source_of(merged), source_of(full)
    for key in base.shapes:
        assert relative_error(1.25 * base.get(key), source.get(key)) < 1e-6


def test_another_model_as_lora_counts(full, source_of):
    patched, target = full.clone(), randn(*SHAPES[QKV])
    patched.add_patches({f"{QKV}.weight": ("model_as_lora", (target,))}, 0.5)
    assert relative_error((weight(source_of(full), QKV) + target) / 2, weight(source_of(patched), QKV)) < 1e-6


# -- bypass loaders


@pytest.mark.parametrize(
    "kind", ["lora", "rank 1", "lora and bias", "loha", "lokr", "lokr, decomposed", "lokr, both decomposed"]
)
def test_a_bypass_lora_is_the_merged_one(full, source_of, kind):
    tensors = adapter(kind, QKV) | adapter(kind, LINEAR2, seed=1) | adapter(kind, MODULATION, seed=2)
    loaded, bypass = (source_of(load(full, tensors, -0.7)) for load in (with_lora, bypassed))
    assert loaded.fingerprint() == bypass.fingerprint() != source_of(full).fingerprint()
    for key in (QKV, LINEAR2, MODULATION):
        assert relative_error(weight(loaded, key), weight(bypass, key)) < 1e-6
        assert torch.equal(weight(loaded, key, "bias"), weight(bypass, key, "bias"))
    assert torch.equal(weight(bypass, MLP), weight(source_of(full), MLP))


def test_a_bypass_lora_on_layers_in_16_bit(full, source_of):
    tensors = {f"{FINAL}.lora_up.weight": randn(64, 4), f"{FINAL}.lora_down.weight": randn(4, H)}
    assert (
        relative_error(
            weight(source_of(with_lora(full, tensors)), FINAL),
            weight(source_of(bypassed(full, tensors)), FINAL),
        )
        < 1e-6
    )


@pytest.mark.parametrize("kind", ["dora", "lokr with dora"])
def test_magnitudes_that_a_bypass_leaves_out_stay_out(comfy, full, tiny_state, source_of, kind):
    """What is quantized is what the model in front of the node draws."""
    bypass = bypassed(full, adapter(kind, QKV))
    assert (
        relative_error(
            weight(source_of(with_lora(full, adapter(kind, QKV))), QKV), weight(source_of(bypass), QKV)
        )
        > 0.1
    )
    state = {k: t.float() for k, t in tiny_state.items()} | {
        f"{QKV.removeprefix(PREFIX)}.weight": weight(source_of(bypass), QKV)
    }
    assert relative_error(forward(bypass), forward(comfy.sd.load_diffusion_model_state_dict(state))) < 1e-5


def test_bypass_loaders_and_others_add_up(full, source_of):
    both = bypassed(with_lora(full, adapter("dora", QKV)), adapter("lora", QKV, seed=5), 0.5)
    want = weight(
        source_of(with_lora(with_lora(full, adapter("dora", QKV)), adapter("lora", QKV, seed=5), 0.5)), QKV
    )
    assert relative_error(want, weight(source_of(both), QKV)) < 1e-6


def test_of_two_bypass_loaders_the_second_counts_as_in_comfyui(full, source_of):
    second = bypassed(bypassed(full, adapter("lora", QKV)), adapter("lora", MLP))
    assert torch.equal(weight(source_of(second), QKV), weight(source_of(full), QKV))
    assert torch.equal(
        weight(source_of(second), MLP), weight(source_of(bypassed(full, adapter("lora", MLP))), MLP)
    )


def test_a_calibration_made_before_the_first_run_serves_after_it(comfy, tiny_state, source_of):
    """The first run leaves a bypass LoRA in the dtype of its layers."""
    held = comfy.sd.load_diffusion_model_state_dict(dict(tiny_state), model_options={"dtype": torch.bfloat16})
    bypass = bypassed(held, adapter("lora", QKV))
    before = source_of(bypass).fingerprint()
    sample(bypass, 1)
    assert source_of(bypass).fingerprint() == before
    assert source_of(held).fingerprint() not in (
        before,
        source_of(bypassed(held, adapter("lora", QKV), 0.9)).fingerprint(),
    )


def test_the_node_quantizes_a_bypass_lora(full, monkeypatch, tmp_path):
    tensors = adapter("lora", QKV) | adapter("lokr", LINEAR2)
    loaded, bypass, plain = (
        codes(quantize(m, monkeypatch, tmp_path))
        for m in (with_lora(full, tensors), bypassed(full, tensors), full.clone())
    )
    assert all(torch.equal(loaded[name], bypass[name]) for name in loaded)
    assert {name for name in plain if not torch.equal(plain[name], bypass[name])} == {QKV, LINEAR2}


# -- what cannot count


def injected(model):
    from comfy.patcher_extension import PatcherInjection

    model.set_injections("motion", [PatcherInjection(inject=lambda p: None, eject=lambda p: None)])


def wrapped_weight(model):
    model.add_weight_wrapper(f"{QKV}.weight", lambda w: w * 2)


def replaced_method(model):
    for i in range(2):
        model.add_object_patch(f"{PREFIX}single_blocks.{i}.forward", lambda *args, **kwargs: None)


def replaced_layer(model):
    model.add_object_patch(f"{PREFIX}img_in", torch.nn.Linear(64, H))


UNCOUNTED = {
    injected: r"this model has injections on motion, which act on its own layers.*Put the node that makes them "
        r"behind the quantized model",
    wrapped_weight: rf"weight wrappers on {QKV}.weight, which",
    replaced_method: rf"object patches on {PREFIX}single_blocks.0.forward, {PREFIX}single_blocks.1.forward, which",
    replaced_layer: rf"object patches on {PREFIX}img_in, which",
    lambda model: vars(model).update(vars(bypassed(model,
    adapter("oft",
    QKV)))): r"no LoRA, LoHa or LoKr on double_blocks.0.img_attn.qkv, which.*LoraLoaderModelOnly",
}  # fmt: skip


@pytest.fixture
def idle(monkeypatch):
    """Nodes must refuse before they sample or fit."""
    import comfy.sample

    from comfyui_nibble.quant_core.run import stages as work

    def begins(*args, **kwargs):
        raise AssertionError("the work began before the refusal")

    monkeypatch.setattr(comfy.sample, "sample", begins)
    monkeypatch.setattr(work, "quantize_layers", begins)


def calibrate(model):
    from comfyui_nibble.nodes.calibrate import NibbleCalibrate

    prompts = {"positive0": [[torch.zeros(1, 8, 128), {"pooled_output": torch.zeros(1, 128)}]]}
    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    NibbleCalibrate.execute(model, prompts, latent, "euler", "simple", 1, 1.0, 1, 1, 4.0, False)


@pytest.mark.parametrize("put_on", UNCOUNTED, ids=lambda f: f.__name__)
def test_what_acts_on_the_models_own_layers_is_refused(full, put_on, refused, idle, monkeypatch, tmp_path):
    model = full.clone()
    put_on(model)
    with pytest.raises(refused, match=UNCOUNTED[put_on]):
        quantize(model, monkeypatch, tmp_path)
    with pytest.raises(refused, match=UNCOUNTED[put_on]):
        calibrate(model)


def replaced_block(model):
    blocks = model.model.diffusion_model.double_blocks
    blocks[0] = torch.nn.Sequential(blocks[0])


def parametrized(model):
    qkv = model.get_model_object(QKV)
    torch.nn.utils.parametrize.register_parametrization(qkv, "weight", torch.nn.Identity())


@pytest.mark.parametrize("put_in", [replaced_block, parametrized], ids=lambda f: f.__name__)
def test_modules_that_are_not_comfyuis_are_refused_before_the_work(comfy, tiny_state, put_in, idle):
    from comfyui_nibble.nodes.host.frame import DetectionError
    from comfyui_nibble.nodes.quantize import NibbleQuantize

    model = comfy.sd.load_diffusion_model_state_dict(dict(tiny_state))
    put_in(model)
    message = "another pack has put modules of its own into this model's network .double_blocks.0.*behind the"
    with pytest.raises(DetectionError, match=message):
        NibbleQuantize.execute(model, "rtn", 8, False)
    with pytest.raises(DetectionError, match=message):
        calibrate(model)


def test_a_method_that_was_written_over_is_named(comfy, tiny_state, source_of, caplog):
    model = comfy.sd.load_diffusion_model_state_dict(dict(tiny_state))
    block = model.get_model_object(f"{PREFIX}single_blocks.0")
    plain, block.forward = block.forward, lambda *args, **kwargs: plain(*args, **kwargs)
    source_of(model)
    assert "another pack has written over what single_blocks.0 of this model's own network" in caplog.text


MISFITS = {
    "lora": ({f"{QKV}.lora_up.weight": randn(3 * H, 4), f"{QKV}.lora_down.weight": randn(4, 512)},
    r"qkv.weight: a LoRA of 768 x 512 on 768 x 256 weights"),
    "loha": ({f"{QKV}.hada_w{i}_{s}": randn(4, 4) for i in (1, 2) for s in "ab"},
    r"qkv.weight: a LoHa of 4 x 4 on 768 x 256 weights"),
    "lokr": ({f"{QKV}.lokr_w1": randn(8, 8), f"{QKV}.lokr_w2": randn(8, 8)},
    r"qkv.weight: a LoKr of 64 x 64 on 768 x 256 weights"),
    "oft": ({f"{QKV}.oft_blocks": randn(4, 64, 64), f"{QKV}.alpha": torch.tensor(0.0)},
    r"qkv.weight: a OFT of 256 x 256 on 768 x 256 weights"),
    "diff": ({f"{QKV}.diff": randn(H, H)},
    r"qkv.weight: a full difference of 256 x 256 on 768 x 256 weights"),
    "set": ({f"{QKV}.set_weight": randn(H)}, r"qkv.weight: a full difference of 256 on 768 x 256 weights"),
    "larger": ({f"{IN}.lora_up.weight": randn(H, 4), f"{IN}.lora_down.weight": randn(4, 128),
    f"{IN}.reshape_weight": torch.tensor([H, 128])},
    r"img_in.weight: a LoRA that makes 256 x 128 weights of 256 x 64"),
    "alone": ({f"{IN}.lora_up.weight": randn(H, 4), f"{IN}.lora_down.weight": randn(4, 384)},
    r"img_in.weight: a LoRA of 256 x 384 on 256 x 64 weights"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
@pytest.mark.parametrize("level", [logging.DEBUG, logging.CRITICAL])
def test_a_lora_of_another_model_is_refused(full, source_of, misfit, idle, kind, level, caplog):
    caplog.set_level(level)
    tensors, message = MISFITS[kind]
    with pytest.raises(misfit, match=rf"{message}.*Take the LoRA, or merge, of another model out"):
        source_of(with_lora(full, tensors))


def test_a_bypass_lora_of_another_model_is_refused(full, source_of, misfit):
    tensors, message = MISFITS["lora"]
    with pytest.raises(misfit, match=message):
        source_of(bypassed(full, tensors))


def test_patches_of_no_known_kind_are_refused(full, source_of, misfit):
    for value, message in (
        (("conjugate", (randn(*SHAPES[QKV]),)), "a patch of the unknown kind 'conjugate'"),
        (
            ("model_as_lora", (randn(H, H),)),
            "the difference to another model, whose weight is 256 x 256, on 768 x 256 weights",
        ),
        (
            [(randn(H, H), lambda w, **kwargs: w)],
            "a merge with another model, whose weight is 256 x 256, on 768 x 256 weights",
        ),
        ((None,), "a full difference without a tensor"),
    ):
        patched = full.clone()
        patched.add_patches({f"{QKV}.weight": value})
        with pytest.raises(misfit, match=message):
            source_of(patched)
    patched = full.clone()
    patched.add_patches({(f"{QKV}.weight", (0, 512, 512)): ("diff", (randn(512, H),))})
    with pytest.raises(misfit, match="positions 512 to 1024 along dimension 0 of 768 x 256 weights"):
        source_of(patched)


def test_a_lora_that_misses_the_first_layer_alone_is_merged_but_for_it(full, source_of, caplog):
    """FLUX.1 dev's on Fill; ComfyUI passes over that layer."""
    tensors = adapter("lora", QKV) | MISFITS["alone"][0]
    source = source_of(with_lora(full, tensors))
    assert "left out, as ComfyUI does: img_in.weight: a LoRA of 256 x 384 on 256 x 64 weights" in caplog.text
    assert torch.equal(weight(source, IN), weight(source_of(full), IN))
    assert torch.equal(weight(source, QKV), weight(source_of(with_lora(full, adapter("lora", QKV))), QKV))


def test_a_new_shape_that_is_the_layers_own_is_none(full, source_of):
    same = adapter("lora", QKV) | {f"{QKV}.reshape_weight": torch.tensor(SHAPES[QKV])}
    assert torch.equal(
        weight(source_of(with_lora(full, same)), QKV),
        weight(source_of(with_lora(full, adapter("lora", QKV))), QKV),
    )
