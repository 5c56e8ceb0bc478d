"""Every kind of adapter beside packed layers, against ComfyUI's own merge into the dequantized weights."""

import hashlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comfyui_nibble.kernels.prologue import Gelu
from comfyui_nibble.tests.host.inside import attached_weight, forward, load, module, packed_hash
from comfyui_nibble.tests.support import relative_error

H = 256
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"  # (768, 256)
MLP = "diffusion_model.double_blocks.0.img_mlp.2"  # (256, 1024), after GELU: shifted activations
LINEAR2 = "diffusion_model.single_blocks.0.linear2"  # (256, 1280), two parts
MODULATION = "diffusion_model.single_blocks.1.modulation.lin"  # (768, 256), weight-only
SHAPES = {QKV: (3 * H, H), MLP: (H, 4 * H), LINEAR2: (H, 5 * H), MODULATION: (3 * H, H)}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.1


def adapter(kind, key, seed=0):
    """The tensors of a LoRA file with one adapter of a kind for one layer."""
    n, k = SHAPES[key]
    r = lambda *shape: randn(*shape, seed=seed)
    plain = {
        f"{key}.lora_up.weight": r(n, 4),
        f"{key}.lora_down.weight": r(4, k),
        f"{key}.alpha": torch.tensor(2.0),
    }
    return {
        "lora": plain,
        "rank 1": {f"{key}.lora_up.weight": r(n, 1), f"{key}.lora_down.weight": r(1, k)},
        "lora and bias": plain | {f"{key}.diff_b": r(n)},
        "dora": plain | {f"{key}.dora_scale": r(n, 1).abs() * 20 + 1},
        "dora by in-channel": plain | {f"{key}.dora_scale": r(1, k).abs() * 20 + 1},
        "loha": {f"{key}.hada_w1_a": r(n, 4), f"{key}.hada_w1_b": r(4, k), f"{key}.hada_w2_a": r(n, 3), f"{key}.hada_w2_b": r(3, k)},
        "loha, dense": {f"{key}.hada_w{i}_{s}": r(n, 24) if s == "a" else r(24, k) for i in (1, 2) for s in "ab"},
        "lokr": {f"{key}.lokr_w1": r(8, 8), f"{key}.lokr_w2": r(n // 8, k // 8), f"{key}.alpha": torch.tensor(2.0)},
        "lokr, decomposed": {f"{key}.lokr_w1": r(4, 8), f"{key}.lokr_w2_a": r(n // 4, 2), f"{key}.lokr_w2_b": r(2, k // 8), f"{key}.alpha": torch.tensor(1.0)},
        "lokr, both decomposed": {f"{key}.lokr_w1_a": r(8, 3), f"{key}.lokr_w1_b": r(3, 4), f"{key}.lokr_w2_a": r(n // 8, 2), f"{key}.lokr_w2_b": r(2, k // 4), f"{key}.alpha": torch.tensor(1.0)},
        "lokr with dora": {f"{key}.lokr_w1": r(8, 8), f"{key}.lokr_w2": r(n // 8, k // 8), f"{key}.dora_scale": r(n, 1).abs() * 20 + 1},
        "glora": {f"{key}.a1.weight": r(4, k), f"{key}.a2.weight": r(k, 4), f"{key}.b1.weight": r(4, k), f"{key}.b2.weight": r(n, 4), f"{key}.alpha": torch.tensor(2.0)},
        "oft": {f"{key}.oft_blocks": r(4, n // 4, n // 4), f"{key}.alpha": torch.tensor(0.0)},
        "diff": {f"{key}.diff": r(n, k)},
        "set": {f"{key}.set_weight": r(n, k)},
    }[kind]  # fmt: skip


KINDS = {  # kind: what stands beside a layer
    "lora": "rank", "rank 1": "rank", "lora and bias": "rank", "dora": "gain, rank", "dora by in-channel": "dense", "loha": "rank 12",
    "loha, dense": "dense", "lokr": "1 Kronecker", "lokr, decomposed": "rank 8", "lokr, both decomposed": "rank 8", "lokr with dora": "dense",
    "glora": "dense", "oft": "dense", "diff": "dense", "set": "gain, dense",
}  # fmt: skip


def with_lora(patcher, tensors, strength=1.0):
    """What LoraLoaderModelOnly does."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(patcher, None, dict(tensors), strength, 0)[0]


def merged(patcher, key):
    """ComfyUI's merge of the patches of a layer into its dequantized weight."""
    import comfy.lora

    return comfy.lora.calculate_weight(
        patcher.patches[f"{key}.weight"], module(patcher, key).layer().dequantize(), key
    )


@pytest.mark.parametrize("strength", [1.0, -0.6])
@pytest.mark.parametrize("key", [QKV, MLP, LINEAR2])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_float_merge(base, kind, key, strength):
    """To rounding: 2.4e-7 is the worst measured, of DoRA's norms."""
    before, plain = packed_hash(base), forward(base)
    patched = with_lora(base, adapter(kind, key), strength)
    out = forward(patched)
    assert relative_error(merged(patched, key), attached_weight(module(patched, key))) < 5e-7
    assert KINDS[kind] in patched._shapes()[key].describe()
    assert relative_error(plain, out) > 1e-4
    assert packed_hash(patched) == before
    assert torch.equal(forward(base), plain)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "diff"])
def test_output_moves_by_the_merged_difference(base, kind):
    """Not only the weights agree: the layer's output with the adapter is its own plus x times the merged
    difference."""
    for key in (
        (QKV, MODULATION) if kind != "dora" else (MODULATION,)
    ):  # DoRA also scales the quantized product
        patched = load(with_lora(base, adapter(kind, key)))
        layer, x = module(patched, key), randn(7, H)
        difference = merged(patched, key) - layer.layer().dequantize()
        want = layer.layer()(x) + x @ difference.T
        assert relative_error(want, layer(x)) < 1e-6
    load(base)


def test_gelu_in_front_is_seen_by_the_terms_beside_the_kernel(base):
    patched = load(with_lora(base, adapter("lokr", MLP)))
    layer, x = module(patched, MLP), randn(7, 4 * H) * 10
    activated = torch.nn.functional.gelu(x, approximate="tanh")
    want = layer.layer()(activated) + activated @ (merged(patched, MLP) - layer.layer().dequantize()).T
    assert relative_error(want, layer(x, prologue=Gelu())) < 1e-6
    load(base)


STYLES = {  # style: (prefix and module, up, down) of the same layers
    "kohya": ({"lora_unet_double_blocks_0_img_attn_qkv": QKV, "lora_unet_single_blocks_0_linear2": LINEAR2}, "lora_up.weight", "lora_down.weight"),
    "BFL": ({QKV: QKV, LINEAR2: LINEAR2}, "lora_B.weight", "lora_A.weight"),
    "diffusers": ({"transformer.transformer_blocks.0.ff.net.2": MLP, "transformer.single_transformer_blocks.0.proj_out": LINEAR2}, "lora_B.weight", "lora_A.weight"),
    "PEFT": ({"transformer.transformer_blocks.0.ff.net.2": MLP}, "lora.up.weight", "lora.down.weight"),
    "diffusers, old": ({"transformer.transformer_blocks.0.ff.net.2": MLP}, "lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
    "OneTrainer": ({"lora_transformer_transformer_blocks_0_ff_net_2": MLP}, "lora_up.weight", "lora_down.weight"),
    "SimpleTuner": ({"lycoris_single_transformer_blocks_0_proj_out": LINEAR2}, "lora_up.weight", "lora_down.weight"),
    "DiffSynth": ({"transformer_blocks.0.ff.net.2": MLP}, "lora_B.default.weight", "lora_A.default.weight"),
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_key_styles(base, style):
    names, up, down = STYLES[style]
    tensors = {}
    for name, key in names.items():
        n, k = SHAPES[key]
        tensors |= {f"{name}.{up}": randn(n, 4), f"{name}.{down}": randn(4, k)}
    patched = load(with_lora(base, tensors, 0.8))
    assert {k.removesuffix(".weight") for k in patched.patches} == set(names.values())
    for key in names.values():
        n, k = SHAPES[key]
        want = module(patched, key).layer().dequantize() + 0.8 * randn(n, 4) @ randn(4, k)
        assert relative_error(want, attached_weight(module(patched, key))) < 5e-7


SLICED = {"to_q": 0, "to_k": H, "to_v": 2 * H, "proj_mlp": 3 * H}


def test_parts_of_fused_layers(base):
    """diffusers keeps q, k, v and the MLP apart; each takes its rows of linear1 and no other."""
    tensors, rows = {}, {"proj_mlp": 4 * H}
    for name in SLICED:
        path = f"transformer.single_transformer_blocks.0.{'' if name == 'proj_mlp' else 'attn.'}{name}"
        tensors |= {
            f"{path}.lora_B.weight": randn(rows.get(name, H), 4, seed=len(name)),
            f"{path}.lora_A.weight": randn(4, H, seed=len(name)),
        }
    linear1 = "diffusion_model.single_blocks.0.linear1"
    for names in (list(SLICED), ["to_k"]):
        patched = load(
            with_lora(base, {k: t for k, t in tensors.items() if any(f".{n}." in k for n in names)})
        )
        want = module(patched, linear1).layer().dequantize()
        for name in names:
            n = rows.get(name, H)
            want[SLICED[name] : SLICED[name] + n] += randn(n, 4, seed=len(name)) @ randn(4, H, seed=len(name))
        assert relative_error(want, attached_weight(module(patched, linear1))) < 5e-7


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "diff", "dora"])
@pytest.mark.parametrize(
    ("offset", "swap"), [((0, 256, 256), False), ((1, 64, 128), False), (None, True), ((0, 256, 512), True)], ids=["rows", "columns", "swap", "both"]
)  # fmt: skip
def test_offsets_and_swapped_halves(comfy, base, kind, offset, swap):
    """Patches as other families' key maps make them: ranges of rows or columns, shift and scale in the other
    order."""
    shape = list(SHAPES[QKV])
    if offset is not None:
        shape[offset[0]] = offset[2]
    SHAPES["part"] = tuple(shape)
    loaded = comfy.lora.load_lora(adapter(kind, "part"), {"part": f"{QKV}.weight"})
    del SHAPES["part"]
    patched = base.clone()
    patched.add_patches(
        {(f"{QKV}.weight", offset, comfy.utils.swap_scale_shift if swap else None): loaded[f"{QKV}.weight"]},
        0.7,
    )
    load(patched)
    assert relative_error(merged(patched, QKV), attached_weight(module(patched, QKV))) < 5e-7


def test_weight_scaled_by_the_patch(base):
    """strength_model, which merging nodes and some LoRA tools use."""
    patched = base.clone()
    patched.add_patches({f"{QKV}.weight": ("diff", (randn(3 * H, H),))}, 0.5, 0.9)
    load(patched)
    assert relative_error(merged(patched, QKV), attached_weight(module(patched, QKV))) < 5e-7


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_stacks_on_off_and_reordered(base, data):
    """Any stack of adapters equals ComfyUI's merge in the same order; the packed bytes and the base's output
    never change."""
    before, plain, keys = packed_hash(base), forward(base), (QKV, MLP, LINEAR2)
    step = st.tuples(
        st.sampled_from(list(KINDS)),
        st.sampled_from(keys),
        st.integers(0, 3),
        st.sampled_from([1.0, 0.5, 0.0, -1.0]),
    )
    stack = data.draw(st.lists(step, min_size=1, max_size=4))
    for order in (
        stack,
        data.draw(st.permutations(stack)),
        data.draw(st.lists(st.sampled_from(stack), max_size=2)),
    ):
        patched = base
        for kind, key, seed, strength in order:
            patched = with_lora(patched, adapter(kind, key, seed), strength)
        load(patched)
        for key in {key for _, key, _, _ in order}:
            # fp32 sums of weights that DoRA and OFT scaled up to 20 times: 1e-6 instead of 2.4e-7 of one
            # adapter.
            assert relative_error(merged(patched, key), attached_weight(module(patched, key))) < 3e-6
        assert packed_hash(patched) == before
        assert patched.model_size() == sum(t.nbytes for t in patched.model.state_dict().values())
    assert torch.equal(forward(base), plain)


@pytest.mark.quick
def test_tensors_of_the_layer_come_back_as_the_very_same(base):
    own = {n: {k: t.data_ptr() for k, t in m.layer().tensors.items()} for n, m in load(base).packed_layers()}
    for kind in KINDS:
        load(with_lora(base, adapter(kind, MLP)))
    load(base)
    assert {
        n: {k: t.data_ptr() for k, t in m.layer().tensors.items()} for n, m in base.packed_layers()
    } == own
    assert all(m.spec.rank == 8 or m.spec.weight_only for _, m in base.packed_layers())
    assert not any(m.attached.loose or m.attached.key for _, m in base.packed_layers())


def test_digest_tells_a_changed_byte(base):
    """The hash that the tests above compare does see a single code."""
    m = module(base, QKV)
    before = packed_hash(base)
    m.weight.data[0, 0] += 1
    assert packed_hash(base) != before
    m.weight.data[0, 0] -= 1
    assert packed_hash(base) == before
    assert len(before) == hashlib.sha256().digest_size * 2
