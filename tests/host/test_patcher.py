"""NibblePatcher in ComfyUI's own machinery: partial loads, hooks, bypass loaders, merges, and what it says of
keys without a layer."""

import logging

import pytest
import torch

from comfyui_nibble.tests.codes import assert_repeats, record
from comfyui_nibble.tests.host.inside import attached_weight, forward, load, module, packed_hash
from comfyui_nibble.tests.host.test_adapters import (
    LINEAR2,
    MLP,
    MODULATION,
    QKV,
    SHAPES,
    H,
    adapter,
    merged,
    randn,
    with_lora,
)
from comfyui_nibble.tests.support import relative_error

CPU = torch.device("cpu")


def lora_on(*keys, seed=0):
    out = {}
    for key in keys:
        out |= adapter("lora", key, seed)
    return out


# -- memory


def held(patcher) -> int:
    """Bytes of all tensors of the model, each counted once."""
    tensors = [*patcher.model.parameters(), *patcher.model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


@pytest.mark.parametrize("kinds", [(), ("lora",), ("dora", "lokr", "diff")])
def test_size_is_what_is_really_held(base, kinds):
    """Scales, branches and adapters counted, before the load and after it; issue: within 2 %."""
    patched = base
    for kind in kinds:
        patched = with_lora(patched, adapter(kind, MLP))
    predicted = patched.model_size()
    load(patched)
    assert patched.model_size() == predicted == patched.loaded_size()
    # model_sampling's table of sigmas and the like are buffers that ComfyUI does not count.
    assert abs(predicted / held(patched) - 1) < 0.02
    load(base)


@pytest.mark.arithmetic
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "diff", "lora and bias"])
def test_partial_loads_and_unloads_change_nothing(comfy, base, kind):
    patched = with_lora(base, adapter(kind, MLP) | lora_on(QKV, LINEAR2))
    recorded, before = record(forward, patched), packed_hash(base)
    comfy.model_management.unload_all_models()
    size = patched.model_size()
    for share in (0.05, 0.3, 0.6, 0.95):  # from nothing
        patched.detach()
        patched.partially_load(CPU, int(size * share))
        there = [m for m in patched.model.modules() if getattr(m, "comfy_patched_weights", False)]
        assert patched.model.model_lowvram
        assert (
            patched.loaded_size() == sum(comfy.model_management.module_size(m) for m in there) <= share * size
        )
        assert_repeats(recorded, run, patched)
    patched.detach()
    for share in (0.2, 0.5, 0.8):  # more and more
        patched.partially_load(CPU, int(size * share) - patched.loaded_size())
        assert_repeats(recorded, run, patched)
    patched.partially_load(CPU, 10**12)
    for share in (0.5, 0.95):  # patched layers go last
        assert patched.partially_unload(CPU, int(patched.loaded_size() * share)) > 0
        assert_repeats(recorded, run, patched)
    patched.partially_load(CPU, 10**12)
    assert torch.equal(recorded[0], run(patched))
    patched.detach()
    assert packed_hash(base) == before
    assert not any(m.attached.key for _, m in base.packed_layers())


def run(patcher):
    """The network as it is loaded now."""
    g = torch.Generator().manual_seed(0)
    x, context, pooled = (torch.randn(1, *s, generator=g) for s in ((16, 16, 16), (8, 128), (128,)))
    with torch.no_grad():
        return patcher.model.diffusion_model(
            x, torch.full((1,), 0.7), context, pooled, guidance=torch.full((1,), 3.5)
        )


def test_clones_take_turns(base):
    """Two branches of one graph share the modules; each load puts its own adapters on."""
    first, second = with_lora(base, lora_on(QKV, MLP)), with_lora(base, lora_on(QKV, seed=5), -0.5)
    want = [forward(p) for p in (base, first, second)]
    assert relative_error(want[0], want[1]) > 0.01
    for i in (2, 0, 1, 0, 2, 1):
        assert torch.equal(forward((base, first, second)[i]), want[i])


# -- hooks


def hooked(comfy, patcher, *groups):
    """A clone with the hooks registered, as the sampler does it."""
    clone = patcher.clone()
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    clone.register_all_hook_patches(comfy.hooks.HookGroup.combine_all_hooks(list(groups)), target)
    return load(clone)


@pytest.mark.arithmetic
def test_hook_lora_acts_while_its_conditioning_runs(comfy, base):
    with_branch = with_lora(base, lora_on(QKV, seed=9))
    plain, want = (record(forward, p) for p in (with_branch, with_lora(with_branch, lora_on(QKV, MLP), 0.8)))
    want_other = record(forward, with_lora(with_branch, lora_on(QKV, LINEAR2, seed=3), 0.8))
    group, other = (
        comfy.hooks.create_hook_lora(t, 0.8, 0.0) for t in (lora_on(QKV, MLP), lora_on(QKV, LINEAR2, seed=3))
    )
    patcher, before = hooked(comfy, with_branch, group, other), packed_hash(base)
    for hooks, recorded in (
        (group, want),
        (other, want_other),
        (None, plain),
        (group, want),
        (other, want_other),
        (None, plain),
    ):
        patcher.apply_hooks(hooks)
        assert_repeats(recorded, run, patcher)
        assert packed_hash(base) == before
    assert relative_error(plain[0], want[0]) > 0.01
    for end in (patcher.unpatch_hooks, patcher.cleanup):
        patcher.apply_hooks(group)
        end()
        assert torch.equal(run(patcher), plain[0])


@pytest.mark.parametrize("kind", ["dora", "lokr", "diff"])
def test_hooks_take_every_kind_of_adapter(comfy, base, kind):
    group = comfy.hooks.create_hook_lora(adapter(kind, MLP), 0.8, 0.0)
    patcher = hooked(comfy, base, group)
    patcher.apply_hooks(group)
    assert (
        relative_error(
            merged(with_lora(base, adapter(kind, MLP), 0.8), MLP), attached_weight(module(base, MLP))
        )
        < 5e-7
    )
    patcher.cleanup()


def test_schedule_sets_the_strength_step_by_step(comfy, base):
    group = comfy.hooks.create_hook_lora(lora_on(QKV), 1.0, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.25, 0.0), (1.0, 0.5)):
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    group.set_keyframes_on_hooks(frames)
    group.hooks[0].hook_keyframe.initialize_timesteps(base.model)
    patcher, sigmas = hooked(comfy, base, group), torch.linspace(1.0, 0.02, 8)
    seen = []
    for sigma in sigmas:
        options = {"transformer_options": {"sample_sigmas": sigmas}}
        patcher.prepare_hook_patches_current_keyframe(sigma[None], group, options)
        patcher.apply_hooks(group)
        difference = attached_weight(module(base, QKV)) - module(base, QKV).layer().dequantize()
        seen.append(
            float(
                (difference * (randn(768, 4) @ randn(4, H))).sum()
                / (randn(768, 4) @ randn(4, H)).square().sum()
            )
            / 0.5
        )  # alpha / rank
    assert [round(s, 4) for s in seen] == sorted(
        [0.25] * seen.count(seen[0]) + [1.0] * (8 - seen.count(seen[0]))
    )
    assert round(seen[0], 4) == 0.25
    assert round(seen[-1], 4) == 1.0
    patcher.cleanup()


def test_hook_that_would_do_nothing_is_an_error(comfy, base):
    group = comfy.hooks.create_hook_lora(
        {"lora_unet_input_blocks_1_attn.lora_up.weight": randn(4, 4)}, 1.0, 0.0
    )
    with pytest.raises(
        RuntimeError,
        match=r"1 key and none has a layer in this model, so the hook would do nothing: "
        r"lora_unet_input_blocks_1",
    ):
        hooked(comfy, base, group)


def test_another_model_as_hook_is_refused(comfy, base, full):
    group = comfy.hooks.create_hook_model_as_lora(
        comfy.hooks.get_patch_weights_from_model(full), None, 1.0, 0.0
    )
    with pytest.raises(
        RuntimeError, match="another model as LoRA, which would be a second full-precision model"
    ):
        hooked(comfy, base, group)


# -- bypass loaders


def bypass(comfy, patcher, tensors, strength=1.0):
    return comfy.sd.load_bypass_lora_for_models(patcher, None, dict(tensors), strength, 0)[0]


@pytest.mark.arithmetic
def test_bypass_loader_equals_the_plain_one(comfy, base):
    """MLP has a GELU fused in front of it, which must be computed before the loader's own products."""
    tensors, plain = lora_on(QKV, MLP, MODULATION), forward(base)
    recorded = record(forward, with_lora(base, tensors, 0.7))
    assert relative_error(plain, recorded[0]) > 0.01
    assert_repeats(recorded, forward, bypass(comfy, base, tensors, 0.7))
    assert torch.equal(forward(base), plain)
    # And again, once the module's forward has been put back.
    assert torch.equal(forward(with_lora(base, tensors, 0.7)), recorded[0])


@pytest.mark.arithmetic
def test_second_bypass_loader_joins_the_first(comfy, base):
    first, second = lora_on(QKV, MLP), lora_on(QKV, LINEAR2, seed=4)
    plain, recorded = forward(base), record(forward, with_lora(with_lora(base, first), second, -0.5))
    assert_repeats(recorded, forward, bypass(comfy, bypass(comfy, base, first), second, -0.5))
    assert torch.equal(forward(base), plain)


def test_bypass_loader_leaves_out_parts_of_fused_layers_and_says_so(comfy, base, caplog):
    path = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{path}.lora_B.weight": randn(H, 4), f"{path}.lora_A.weight": randn(4, H)} | lora_on(MLP)
    with caplog.at_level(logging.WARNING):
        bypass(comfy, base, tensors)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Nibble")]
    assert len(lines) == 1
    assert (
        "1 key for parts of fused layers are left out by the bypass loader: "
        "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    ) in lines[0]
    assert "LoraLoaderModelOnly" in lines[0]


# -- merges


def merge(into, other, ratio):
    """What ModelMergeSimple does."""
    out = into.clone()
    for key, value in other.get_key_patches("diffusion_model.").items():
        out.add_patches({key: value}, 1.0 - ratio, ratio)
    return out


def test_packed_model_merges_into_a_full_one(base, full):
    """Real values: dequantized weights, and biases without the correction for shifted activations."""
    patched = with_lora(base, lora_on(QKV))
    out = load(merge(full, patched, 0.25))
    for key, weight in ((QKV, merged(patched, QKV)), (MLP, module(base, MLP).layer().dequantize())):
        own = full.backup.get(f"{key}.weight")
        own = own.weight if own is not None else module(full, key).weight
        assert relative_error(0.25 * own.float() + 0.75 * weight, module(out, key).weight) < 0.005
    bias = full.backup[f"{MLP}.bias"].weight
    assert relative_error(bias.float(), module(out, MLP).bias) < 0.005
    load(full)


def test_merging_into_a_packed_model_is_refused(base, full, tiny_packed):
    for other in (full, tiny_packed()):
        with pytest.raises(
            RuntimeError,
            match="a merge with another model, which would be a second full-precision model beside this one",
        ):
            merge(base, other, 0.5)


def test_bias_difference_keeps_the_correction(base):
    patched = with_lora(base, {f"{MLP}.diff_b": randn(H)})
    own = module(base, MLP).bias.data.clone()
    load(patched)
    assert relative_error(own + randn(H), module(patched, MLP).bias) < 1e-6
    load(base)
    assert torch.equal(module(base, MLP).bias, own)


# -- what fits nothing


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Nibble")]


def test_keys_without_a_layer_are_counted_once(comfy, base, full, caplog):
    stray = {f"lora_unet_input_blocks_{i}_attn.lora_up.weight": randn(4, 4) for i in range(6)}
    with caplog.at_level(logging.WARNING):
        with_lora(full, lora_on(QKV) | stray)  # another model's own business
        assert said(caplog) == []
        with_lora(base, lora_on(QKV) | stray)
    assert said(caplog) == [
        "Nibble: 6 keys of the LoRA file found no layer in this model: "
        + ", ".join(f"lora_unet_input_blocks_{i}_attn.lora_up.weight" for i in range(4))
        + ", ..."
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        with_lora(base, lora_on(QKV))
        group = comfy.hooks.create_hook_lora(lora_on(QKV) | stray, 1.0, 0.0)
        hooked(comfy, base, group).cleanup()
    lines = [r.getMessage() for r in caplog.records]
    assert len(said(caplog)) == 1
    assert not any(line.startswith("lora key not loaded") for line in lines)  # ComfyUI asks for silence there


def test_lora_of_another_architecture(base):
    with pytest.raises(
        RuntimeError,
        match=r"2 keys and none has a layer in this model, so the LoRA was made for another one: "
        r"lora_unet_input",
    ):
        with_lora(base, {f"lora_unet_input_blocks_{i}_attn.lora_up.weight": randn(4, 4) for i in range(2)})


def test_lora_of_another_width_lists_the_first_misfits(base):
    wide = {}
    for i, (key, (n, k)) in enumerate(SHAPES.items()):
        wide |= {
            f"{key}.lora_up.weight": randn(n, 4),
            f"{key}.lora_down.weight": randn(4, k * (1 if i == 1 else 2)),
        }
    with pytest.raises(RuntimeError) as caught:
        with_lora(base, wide)
    message = str(caught.value)
    assert f"{QKV}.weight: a LoRA of 768 x 512 on 768 x 256 weights, made for another model," in message
    assert "3 such layers in all" in message
    assert not base.patches


def test_misfit_on_a_layer_in_16_bit_is_an_error_too(base):
    """ComfyUI would log it and sample without."""
    key = "diffusion_model.final_layer.linear"
    with pytest.raises(RuntimeError, match=rf"{key}.weight: a LoRA of 64 x 512 on 64 x 256 weights"):
        with_lora(base, {f"{key}.lora_up.weight": randn(64, 4), f"{key}.lora_down.weight": randn(4, 512)})


def test_what_dense_adapters_cost_is_said(base):
    text = with_lora(base, adapter("diff", QKV) | adapter("lora", MLP)).lora_summary()
    assert "adapters on 2 packed layers" in text
    assert (
        f"1 of them as dense matrices in 16 bit, which cost as much as the layer in full precision: {QKV}"
        in text
    )


def test_weight_wrappers_are_refused(base):
    with pytest.raises(RuntimeError, match="a weight wrapper sees float weights, and this layer is packed"):
        base.clone().add_weight_wrapper(f"{QKV}.weight", lambda w: w)
