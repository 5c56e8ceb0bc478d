"""Patches that only multiply a tensor, `(None,)` at strength 0: an exact gain on a packed layer, in every way
ComfyUI holds a model."""

import re

import pytest
import torch

from comfyui_nibble.tests.assets.synthetic import random_state, sdxl_shapes, wan_shapes
from comfyui_nibble.tests.host.inside import attached_weight, forward, load, module, packed_hash
from comfyui_nibble.tests.host.test_adapters import (
    LINEAR2,
    MLP,
    MODULATION,
    QKV,
    H,
    adapter,
    merged,
    randn,
    with_lora,
)
from comfyui_nibble.tests.host.test_patcher import CPU, hooked, run
from comfyui_nibble.tests.support import relative_error

ONLY = (None,)
LAYERS = (QKV, MLP, LINEAR2, MODULATION)


def scaled(patcher, factor, keys=LAYERS, leaves=("weight", "bias"), value=ONLY):
    """As UNetSelfAttentionMultiply and its like do it: one call for each key."""
    out = patcher.clone()
    for key in keys:
        for leaf in leaves:
            out.add_patches({f"{key}.{leaf}": value}, 0.0, factor)
    return out


def own_bias(m):
    """The model's own bias of a packed module: the stored one, and the correction for shifted activations
    taken off it."""
    return m.convert_bias(m.bias.data.float())


# -- the weight


@pytest.mark.parametrize(
    "value",
    [ONLY, ("diff", ONLY), ("diff", (torch.ones(2, 3),))],
    ids=["plain", "named", "tensor never looked at"],
)
@pytest.mark.parametrize("factor", [1.1, 0.0, -0.5, 3.0])
def test_weight_is_comfyuis(base, factor, value):
    before = packed_hash(base)
    patched = load(scaled(base, factor, value=value))
    for key in LAYERS:
        m = module(patched, key)
        if factor:
            assert relative_error(merged(patched, key), attached_weight(m)) < 5e-7
        assert relative_error(factor * m.layer().dequantize() + 1e-9, attached_weight(m) + 1e-9) < 5e-7
        assert patched._shapes()[key].describe() == "gain"
    assert packed_hash(base) == before
    load(base)
    assert not any(m.attached.key for _, m in base.packed_layers())


METHODS = {
    "svdquant_r": {"rank": 8, "gptq": False, "iterations": 0}, "splitquant": {}, "convrot": {}, "rtn": {},
    "robuq": {}, "native": {"quality_db": 20.0},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_it(packed, tiny_state, one_thread, method):
    """Also over and under a LoRA and a difference."""
    model = packed(tiny_state, method, **METHODS[method])()
    keys = [k for k in LAYERS if model._packed(f"{k}.weight")]
    assert keys
    with_loras = with_lora(
        with_lora(model, adapter("lora", QKV) | adapter("diff", MLP), 0.7), adapter("lokr", LINEAR2)
    )
    for patched in (
        scaled(model, 0.9, keys),
        scaled(with_loras, 0.9, keys),
        with_lora(scaled(model, 0.9, keys), adapter("dora", QKV)),
    ):
        load(patched)
        for key in keys:
            m = module(patched, key)
            if patched.patches.get(f"{key}.weight"):
                assert relative_error(merged(patched, key), attached_weight(m)) < 5e-7


@pytest.mark.parametrize(
    "kind",
    ["lora", "dora", "dora by in-channel", "loha", "lokr", "lokr, decomposed", "glora", "oft", "diff", "set"],
)
@pytest.mark.parametrize("first", [True, False], ids=["under", "over"])
def test_order_among_adapters_counts(base, kind, first):
    """A DoRA's norms and a `set` see what was scaled before them; a scale after them takes them along."""
    one = scaled(base, 1.3, (MLP,)) if first else with_lora(base, adapter(kind, MLP), 0.8)
    patched = load(with_lora(one, adapter(kind, MLP), 0.8) if first else scaled(one, 1.3, (MLP,)))
    assert relative_error(merged(patched, MLP), attached_weight(module(patched, MLP))) < 5e-7
    if kind == "lokr" and not first:
        assert patched._shapes()[MLP].describe() == "gain, 1 Kronecker"  # no matrix of the layer's size


@pytest.mark.parametrize(("offset", "dense"),
[((0, 256, 256), False), ((0, 0, 768), False), ((1, 64, 128), True)],
ids=["rows", "all", "columns"])  # fmt: skip
@pytest.mark.parametrize("swap", [False, True])
def test_parts_of_a_layer(comfy, base, offset, dense, swap):
    """ComfyUI's function is for the difference alone, and there is none."""
    patched = with_lora(base, adapter("lokr", QKV) | adapter("lora", QKV, 3))
    patched.add_patches(
        {(f"{QKV}.weight", offset, comfy.utils.swap_scale_shift if swap else None): ONLY}, 0.0, 0.4
    )
    load(patched)
    assert relative_error(merged(patched, QKV), attached_weight(module(patched, QKV))) < 5e-7


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "oft", "diff", "set"])
def test_adapter_at_strength_0_is_its_factor(base, kind):
    """Only a `set` acts at strength 0; of the others nothing is kept beside the layer, whatever they are."""
    import comfy.lora

    value = comfy.lora.load_lora(adapter(kind, MLP), {MLP: f"{MLP}.weight"})[f"{MLP}.weight"]
    patched = base.clone()
    patched.add_patches({f"{MLP}.weight": value}, 0.0, 0.9)
    load(patched)
    assert patched._shapes()[MLP].describe() == ("gain, dense 256 x 1024" if kind == "set" else "gain")
    assert relative_error(merged(patched, MLP), attached_weight(module(patched, MLP))) < 5e-7


def test_factor_1_leaves_the_layers_alone(base):
    plain = forward(base)
    patched = scaled(base, 1.0)
    assert torch.equal(forward(patched), plain)
    assert patched.model_size() == base.model_size()


def test_merge_that_takes_nothing_of_the_other_model_only_scales(base, full):
    """ModelMergeSimple at ratio 1: strength 0, so ComfyUI adds nothing of the other model."""
    other = full.get_key_patches("diffusion_model.double_blocks.0.img_attn.qkv.weight")
    patched = base.clone()
    patched.add_patches(other, 0.0, 1.0)
    assert torch.equal(forward(patched), forward(base))


# -- the bias


def runs(comfy, patched):
    """Names of ComfyUI's ways to hold a model, each loaded by the time it is yielded."""
    yield "full", load(patched)
    size = patched.model_size()
    for share in (0.05, 0.5, 0.9):
        patched.detach()
        patched.partially_load(CPU, int(size * share))
        yield f"{share} fits", patched
    patched.partially_load(CPU, 10**12)
    yield "the rest too", patched
    patched.partially_unload(CPU, int(size * 0.7))
    yield "most unloaded", patched
    patched.partially_load(CPU, 10**12)
    yield "back again", patched


@pytest.mark.parametrize(
    "scaled_leaves", [("weight", "bias"), ("weight",), ("bias",)], ids=["both", "weight", "bias"]
)
def test_bias_is_scaled_without_its_correction_in_every_state(comfy, base, scaled_leaves):
    """MLP's stored bias holds a correction for shifted activations, which belongs to the weight. Its
    difference comes first, then 0.6."""
    from comfyui_nibble.nodes.host.real_values import RealValues

    m = module(load(base), MLP)
    true, weight, x = own_bias(m).clone(), m.layer().dequantize(), randn(7, 4 * H)
    patched = scaled(with_lora(base, {f"{MLP}.diff_b": randn(H)}), 0.6, (MLP,), scaled_leaves)
    bias = (true + randn(H)) * (0.6 if "bias" in scaled_leaves else 1.0)
    plain = m(x) - true  # GELU is in it
    for state, _ in runs(comfy, patched):
        assert relative_error(bias, own_bias(m)) < 1e-6, state
        want = plain * (0.6 if "weight" in scaled_leaves else 1.0) + bias
        assert relative_error(want, m(x)) < 1e-5, state
        assert all(
            isinstance(f, RealValues) for f in (*m.weight_function, *m.bias_function)
        )  # no patch is left to be computed at each call
    patched.detach()
    assert torch.equal(own_bias(m), true)
    assert relative_error(weight, attached_weight(m)) < 1e-9


def test_whole_block_in_every_state(comfy, base):
    """Not one layer but the network: the states agree, and it moves."""
    keys = [n for n, _ in base.packed_layers() if ".double_blocks.0." in n]
    patched, plain = scaled(base, 0.8, keys), forward(base)
    want = forward(patched)
    assert relative_error(plain, want) > 0.01
    for _ in runs(comfy, patched):
        assert relative_error(want, run(patched)) < 1e-6
    patched.detach()
    assert torch.equal(forward(base), plain)


def test_hooks_scale_weight_and_bias(comfy, base):
    """Twice over: the second time ModelPatcher takes the bias from its cache."""
    from comfy.hooks import EnumHookScope, HookGroup, WeightHook

    class Scale(WeightHook):
        def add_hook_patches(self, model, model_options, target_dict, registered):
            model.add_hook_patches(self, {f"{MLP}.weight": ONLY, f"{MLP}.bias": ONLY}, 0.0, 0.6)
            registered.add(self)
            return True

    m, x = module(base, MLP), randn(7, 4 * H)
    true, plain = own_bias(m), m(x).detach()
    hook, group = Scale(), HookGroup()
    hook.hook_scope = EnumHookScope.AllConditioning
    group.add(hook)
    patcher = hooked(comfy, base, group)
    for _ in range(3):
        patcher.apply_hooks(group)
        assert relative_error(0.6 * true, own_bias(m)) < 1e-6
        assert relative_error(0.6 * plain, m(x)) < 1e-5
        assert relative_error(0.6 * m.layer().dequantize(), attached_weight(m)) < 5e-7
        patcher.apply_hooks(None)
        assert torch.equal(own_bias(m), true)
        assert torch.equal(m(x), plain)
    patcher.cleanup()


def test_clones_with_and_without_take_turns(base):
    half, double = scaled(base, 0.5), scaled(scaled(base, 0.5), 4.0)
    want = [forward(p) for p in (base, half, double)]
    for i in (2, 0, 1, 0, 2, 1):
        assert torch.equal(forward((base, half, double)[i]), want[i])
    assert (
        relative_error(
            2.0 * module(base, QKV).layer().dequantize(), attached_weight(module(load(double), QKV))
        )
        < 5e-7
    )
    load(base)


def test_all_tensors_of_a_block_by_pattern(base):
    """ComfyUI_essentials' FluxBlocksBuster: every key of the state dict that a pattern finds, quantization
    data among them."""
    patched, pattern = base.clone(), re.compile(r"double_blocks\.0\.")
    keys = [k for k in base.model_state_dict() if pattern.search(k)]
    assert any(k.endswith("weight_scale") for k in keys)
    for k in keys:
        assert patched.add_patches({k: ONLY}, 0.0, 0.7) == [k]
    assert not any(
        k.endswith(("weight_scale", "proj_up", "proj_down", "smooth_factor")) for k in patched.patches
    )
    load(patched)
    for name, m in base.packed_layers():
        factor = 0.7 if pattern.search(name) else 1.0
        assert relative_error(factor * m.layer().dequantize(), attached_weight(m)) < 5e-7
    load(base)


def test_real_patch_of_quantization_data_is_refused(base):
    key = f"{QKV}.weight_scale"
    scale = module(base, QKV).weight_scale
    with pytest.raises(
        RuntimeError, match=rf"{key}: a patch of quantization data cannot be put on this quantized model"
    ):
        base.clone().add_patches({key: ("diff", (torch.zeros_like(scale),))})


@pytest.mark.parametrize(("value", "strength"), [(ONLY, 1.0), (("diff", ONLY), 0.5), (("set", ONLY), 0.0)])
@pytest.mark.parametrize("key", [f"{QKV}.weight", f"{MLP}.bias", "diffusion_model.img_in.weight"])
def test_nothing_to_add_at_a_strength_is_an_error_at_once(base, key, value, strength):
    """ComfyUI would stop in the middle of the load: 'NoneType' object has no attribute 'shape'."""
    with pytest.raises(RuntimeError, match=rf"{key}: a full difference without a tensor"):
        base.clone().add_patches({key: value}, strength)


# -- nodes


@pytest.fixture(scope="module")
def unet(packed, one_thread):
    return packed(random_state(sdxl_shapes()), "rtn")()


def unet_forward(patcher):
    g = torch.Generator().manual_seed(0)
    x, context, label = (
        torch.randn(1, 4, 16, 16, generator=g),
        torch.randn(1, 77, 2048, generator=g),
        torch.randn(1, 2816, generator=g),
    )
    with torch.no_grad():
        return load(patcher).model.diffusion_model(x, torch.tensor([500.0]), context=context, y=label)


@pytest.mark.parametrize("kind", ["Self", "Cross", "Temporal"])
def test_comfyuis_attention_multiply(unet, kind):
    """On SDXL; the effect on the full-precision weights is the same to the quantization."""
    from comfy_extras import nodes_attention_multiply as nodes

    node = getattr(nodes, f"UNet{kind}AttentionMultiply")
    args = (0.5, 1.0, 2.0, 1.0) if kind == "Temporal" else (1.2, 1.0, 0.9, 1.5)
    patched = node.execute(unet, *args).args[0]
    plain, out = unet_forward(unet), unet_forward(patched)
    assert relative_error(plain, out) > 1e-3
    touched = [k for k, p in patched.patches.items() if p[-1][2] != 1.0]
    assert any(k.endswith(".bias") for k in touched)
    for key in touched:
        name, _, leaf = key.rpartition(".")
        m, factor = module(unet, name), patched.patches[key][-1][2]
        if unet._packed(key) and leaf == "weight":
            assert relative_error(factor * m.layer().dequantize(), attached_weight(m)) < 5e-7
    assert torch.equal(unet_forward(unet), plain)


def test_blocks_of_wan(packed, one_thread):
    model = packed(random_state(wan_shapes(dim=256, ffn=512)), "svdquant", rank=8, gptq=False, iterations=0)()
    keys = [n for n, _ in model.packed_layers()]
    true = {key: own_bias(module(model, key)).clone() for key in keys}
    patched = load(scaled(model, 0.75, keys))
    for key in keys:
        m = module(patched, key)
        assert relative_error(merged(patched, key), attached_weight(m)) < 5e-7
        assert relative_error(0.75 * true[key], own_bias(m)) < (
            1e-6 if m.bias.dtype == torch.float32 else 2**-8
        )  # rounding to bf16
    load(model)


def test_scales_in_32_bit_are_counted(base):
    """They were in 16; and the bias's correction where activations are shifted."""
    plain, patched = base.model_size(), scaled(base, 0.5)
    predicted = patched.model_size()
    load(patched)
    assert predicted == sum(t.nbytes for t in patched.model.state_dict().values()) > plain
    load(base)


def test_bake_writes_the_gain_into_scales_and_bias(base):
    """The file's scales are in 16 bit: 2^-8. The model that is baked keeps its own bias, which the patches
    are computed on a copy of."""
    from comfyui_nibble.nodes.bake import NibbleBakeLora

    true = own_bias(module(load(base), MLP)).clone()
    patched = scaled(with_lora(base, {f"{MLP}.diff_b": randn(H)}), 0.6, (MLP, QKV))
    baked = NibbleBakeLora.execute(patched, 0).args[0]
    for key in (MLP, QKV):
        assert (
            relative_error(0.6 * module(base, key).layer().dequantize(), attached_weight(module(baked, key)))
            < 2**-8
        )
    assert (
        relative_error((true + randn(H)) * 0.6, own_bias(module(baked, MLP))) < 0.01
    )  # its correction is of the rounded scales
    assert torch.equal(own_bias(module(load(base), MLP)), true)
