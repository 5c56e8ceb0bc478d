"""What of a file that does not fit everywhere is put on a quantized model: the rest acts, with one warning,
or the file is refused."""

import logging

import pytest
import torch

from comfyui_nibble.tests.assets.synthetic import random_state, sdxl_shapes, wan_shapes
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
from comfyui_nibble.tests.host.test_patcher import bypass, hooked, lora_on, said
from comfyui_nibble.tests.support import relative_error

IMG_IN = "diffusion_model.img_in"
SHAPES["narrow"] = (H, 64)  # what Turbo's LoRA has for FLUX's img_in


@pytest.fixture(scope="module")
def filling(tiny_state):
    """The small FLUX with the 384 in-channels of FLUX Fill: 64 of the picture, the rest of the masked one and
    the mask, not trained."""
    first = tiny_state["img_in.weight"]
    return dict(tiny_state) | {"img_in.weight": torch.cat([first, torch.zeros(H, 320).to(first)], 1)}


@pytest.fixture(scope="module")
def fill(packed, filling, one_thread):
    return packed(filling, "svdquant_r", rank=32)()


def on(key, kind, shape, seed=0):
    """An adapter's tensors as if the layer `key` had a shape."""
    SHAPES["other"] = shape
    tensors = {k.replace("other", key): t for k, t in adapter(kind, "other", seed).items()}
    del SHAPES["other"]
    return tensors


def warnings(caplog, act):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        out = act()
    return (
        out,
        said(caplog),
        [r.getMessage() for r in caplog.records if not r.getMessage().startswith("Nibble")],
    )


# -- a few misfits

WORDS = {"lora": "LoRA", "lora and bias": "LoRA", "loha": "LoHa", "lokr": "LoKr", "dora": "LoRA",
"diff": "full difference", "set": "full difference"}  # fmt: skip


@pytest.mark.parametrize("kind", WORDS)
def test_turbo_lora_acts_on_fill_but_for_its_input_layer(fill, caplog, kind):
    """And is exactly what it is without that layer."""
    tensors = adapter("lora", QKV) | adapter("lora", LINEAR2)
    want = load(with_lora(fill, tensors, 0.8))
    expected = {k: attached_weight(module(want, k)).clone() for k in (QKV, LINEAR2)}
    patched, lines, others = warnings(
        caplog, lambda: with_lora(fill, tensors | on(IMG_IN, kind, (H, 64)), 0.8)
    )
    assert lines == [
        f"Nibble: 1 key of the LoRA file left out, made for layers of another shape: {IMG_IN}.weight (a "
        f"{WORDS[kind]} of 256 x 64 on 256 x 384 weights)"
    ]
    assert others == []  # not a second line from ComfyUI
    assert f"{IMG_IN}.weight" not in patched.patches
    load(patched)
    for key, weight in expected.items():
        assert torch.equal(attached_weight(module(patched, key)), weight)
    load(fill)


def test_it_moves_the_model_as_in_stock(comfy, fill, filling):
    """ComfyUI keeps the misfit's weight and merges the rest."""
    tensors = lora_on(QKV, MLP, LINEAR2) | on(IMG_IN, "lora", (H, 64))
    stock = comfy.sd.load_diffusion_model_state_dict(dict(filling))

    def out(patcher):
        g = torch.Generator().manual_seed(0)
        x, context, pooled = (torch.randn(1, *s, generator=g) for s in ((96, 16, 16), (8, 128), (128,)))
        with torch.no_grad():
            return load(patcher).model.diffusion_model(
                x, torch.full((1,), 0.7), context, pooled, guidance=torch.full((1,), 3.5)
            )

    effect, full_effect = (out(with_lora(m, tensors, 8.0)) - out(m) for m in (fill, stock))
    assert relative_error(out(stock), out(stock) + full_effect) > 0.5
    # 0.982; at strength 4 0.968, at 1 0.81: the quantization's own 0.11 of the output parts the two, this
    # LoRA moves it by 0.12 at 1.
    assert torch.nn.functional.cosine_similarity(effect.flatten(), full_effect.flatten(), dim=0) > 0.95


def test_hook_lora_leaves_the_same_out(comfy, fill, caplog):
    group = comfy.hooks.create_hook_lora(lora_on(QKV, LINEAR2) | on(IMG_IN, "lora", (H, 64)), 0.8, 0.0)
    patcher, lines, _ = warnings(caplog, lambda: hooked(comfy, fill, group))
    assert [line.split(":")[1] for line in lines] == [
        " 1 key of the LoRA file left out, made for layers of another shape"
    ]
    patcher.apply_hooks(group)
    for key in (QKV, LINEAR2):
        assert (
            relative_error(
                merged(with_lora(fill, lora_on(QKV, LINEAR2), 0.8), key), attached_weight(module(fill, key))
            )
            < 5e-7
        )
    patcher.cleanup()


def test_a_few_packed_layers_may_misfit(base, caplog):
    """1 of 4: left out. The packed bytes and the others' patches are what they are without it."""
    before = packed_hash(base)
    patched, lines, _ = warnings(
        caplog, lambda: with_lora(base, lora_on(QKV, LINEAR2, MODULATION) | on(MLP, "lora", (H, H)))
    )
    assert lines == [
        f"Nibble: 1 key of the LoRA file left out, made for layers of another shape: {MLP}.weight (a LoRA "
        "of 256 x 256 on 256 x 1024 weights)"
    ]
    load(patched)
    assert not module(patched, MLP).attached.key
    assert relative_error(merged(patched, QKV), attached_weight(module(patched, QKV))) < 5e-7
    assert packed_hash(base) == before


@pytest.mark.parametrize(("fitting", "missing"), [(2, 2), (3, 1), (1, 3), (0, 1), (0, 4)])
def test_half_of_the_packed_layers_have_to_fit(base, fitting, missing):
    keys = [QKV, MLP, LINEAR2, MODULATION][: fitting + missing]
    tensors = lora_on(*keys[:fitting])
    for key in keys[fitting:]:
        tensors |= on(key, "lora", (SHAPES[key][0], 2 * SHAPES[key][1]))
    if fitting >= missing:
        assert set(with_lora(base, tensors).patches) == {f"{k}.weight" for k in keys[:fitting]}
    else:
        with pytest.raises(
            RuntimeError, match=r"made for another model, cannot be put on this quantized model"
        ):
            with_lora(base, tensors)


def test_parts_of_fused_layers_are_counted_one_by_one(base, caplog):
    """diffusers' q, k and v are three patches of one weight."""
    path = "transformer.transformer_blocks.0.attn.to_"
    tensors = lora_on(MLP)
    for name, n in (("q", H), ("k", H), ("v", 2 * H)):
        tensors |= {f"{path}{name}.lora_B.weight": randn(n, 4), f"{path}{name}.lora_A.weight": randn(4, H)}
    patched, lines, _ = warnings(caplog, lambda: with_lora(base, tensors))
    assert lines[0].endswith(f"{QKV}.weight (a LoRA of 512 x 256 on 256 x 256 weights)")
    assert len(patched.patches[f"{QKV}.weight"]) == 2


def test_bias_of_another_length_is_left_out(base, caplog):
    """ComfyUI logs 'WEIGHT NOT MERGED' there."""
    patched, lines, _ = warnings(
        caplog, lambda: with_lora(base, lora_on(QKV) | {f"{MLP}.diff_b": randn(H + 1)})
    )
    assert lines[0].endswith(f"{MLP}.bias (a full difference of 257 on 256 weights)")
    assert set(patched.patches) == {f"{QKV}.weight"}


@pytest.mark.parametrize("kind", ["oft", "lora"])
def test_adapters_that_turn_the_rows_are_measured_too(base, caplog, kind):
    tensors = lora_on(QKV, MLP) | on(LINEAR2, kind, (2 * H, 5 * H))
    _, lines, _ = warnings(caplog, lambda: with_lora(base, tensors))
    assert lines[0].endswith(
        f"{LINEAR2}.weight (a {kind.upper().replace('LORA', 'LoRA')} of 512 x 1280 on 256 x 1280 weights)"
    )


# -- nodes that hand on one key at a time


def key_by_key(comfy, patcher, tensors):
    """What block-weight loaders do: load_lora for the file, add_patches for each key."""
    out = patcher.clone()
    loaded = comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(out.model, {}))
    for key, value in loaded.items():
        out.add_patches({key: value}, 0.8)
    return out


def test_one_key_at_a_time_is_judged_by_its_file(comfy, fill, caplog):
    patched, lines, _ = warnings(
        caplog, lambda: key_by_key(comfy, fill, lora_on(QKV, LINEAR2) | on(IMG_IN, "lora", (H, 64)))
    )
    assert set(patched.patches) == {f"{QKV}.weight", f"{LINEAR2}.weight"}
    assert len(lines) == 1
    with pytest.raises(RuntimeError, match="made for another model, cannot be put"):
        key_by_key(comfy, fill, on(QKV, "lora", (9, 9)) | on(MLP, "lora", (9, 9)) | lora_on(LINEAR2))


def test_one_key_of_no_file_is_refused(fill):
    """Nothing of it fits."""
    with pytest.raises(
        RuntimeError,
        match=rf"{IMG_IN}.weight: a full difference of 256 x 64 on 256 x 384 weights, made for another model,",
    ):
        fill.clone().add_patches({f"{IMG_IN}.weight": ("diff", (randn(H, 64),))})


# -- other models, other layers


@pytest.fixture(scope="module")
def wan(packed, one_thread):
    return packed(random_state(wan_shapes(dim=256, ffn=512, channels=36)), rank=8, gptq=False, iterations=0)()


def test_text_to_video_lora_on_image_to_video(wan, caplog):
    """Wan's patch embedding is a convolution in 16 bit: 16 channels on 36. Its LoRA, and a difference such as
    lightx2v's files have."""
    q, embedding = "diffusion_model.blocks.0.self_attn.q", "diffusion_model.patch_embedding"
    plain = {f"{q}.lora_up.weight": randn(256, 4), f"{q}.lora_down.weight": randn(4, 256)}
    conv = {
        f"{embedding}.lora_up.weight": randn(256, 4, 1, 1, 1),
        f"{embedding}.lora_down.weight": randn(4, 16, 1, 2, 2),
    }
    for misfit, what in ((conv, "LoRA of 256 x 64 on 256 x 36 x 1 x 2 x 2"),
    ({f"{embedding}.diff": randn(256, 16, 1, 2, 2)},
    "full difference of 256 x 16 x 1 x 2 x 2 on 256 x 36 x 1 x 2 x 2")):  # fmt: skip
        patched, lines, _ = warnings(caplog, lambda misfit=misfit: with_lora(wan, plain | misfit))
        assert lines[0].endswith(f"{embedding}.weight (a {what} weights)")
        assert set(patched.patches) == {f"{q}.weight"}
    fitting = {
        f"{embedding}.lora_up.weight": randn(256, 4, 1, 1, 1),
        f"{embedding}.lora_down.weight": randn(4, 36, 1, 2, 2),
    }
    patched, lines, others = warnings(caplog, lambda: load(with_lora(wan, plain | fitting)))
    assert lines == others == []
    assert set(patched.patches) == {f"{q}.weight", f"{embedding}.weight"}
    load(wan)


def test_lora_of_a_larger_wan_is_refused(wan):
    tensors = {}
    for name in ("self_attn.q", "self_attn.k", "cross_attn.o"):
        tensors |= on(f"diffusion_model.blocks.0.{name}", "lora", (320, 320))
    with pytest.raises(RuntimeError, match=r"\(3 such layers in all\)"):
        with_lora(wan, tensors)


@pytest.fixture(scope="module")
def unet(packed, one_thread):
    return packed(random_state(sdxl_shapes()), "rtn")()


def test_inpainting_lora_on_sdxl(unet, caplog):
    """9 channels on 4, a convolution."""
    names = [n for n, _ in unet.packed_layers()][:3]
    tensors = {}
    for name in names:
        n, k = module(unet, name).out_features, module(unet, name).in_features
        tensors |= on(name, "lora", (n, k))
    first = "diffusion_model.input_blocks.0.0"
    tensors |= {
        f"{first}.lora_up.weight": randn(320, 4, 1, 1),
        f"{first}.lora_down.weight": randn(4, 9, 3, 3),
    }
    patched, lines, _ = warnings(caplog, lambda: load(with_lora(unet, tensors)))
    assert lines[0].endswith(f"{first}.weight (a LoRA of 320 x 81 on 320 x 4 x 3 x 3 weights)")
    for name in names:
        assert relative_error(merged(patched, name), attached_weight(module(patched, name))) < 5e-7
    load(unet)


# -- reshape_weight


def reshaping(key, shape, to):
    return on(key, "lora", shape) | {f"{key}.reshape_weight": torch.tensor(to)}


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("key", [QKV, MLP, LINEAR2, MODULATION])
def test_own_shape_is_no_reshape(base, key, strength):
    patched = load(with_lora(base, reshaping(key, SHAPES[key], SHAPES[key]), strength))
    assert relative_error(merged(patched, key), attached_weight(module(patched, key))) < 5e-7
    assert "rank" in patched._shapes()[key].describe()
    load(base)


def test_control_lora_widens_the_input_layer_as_in_stock(base, full):
    """BFL's control LoRAs: img_in gets 128 in-channels, 64 of them for the control picture. And back, when it
    is gone."""
    tensors = lora_on(QKV) | reshaping(IMG_IN, (H, 128), (H, 128))
    plain = forward(base)
    patched, stock = load(with_lora(base, tensors, 0.8)), load(with_lora(full, tensors, 0.8))
    weight, want = module(patched, IMG_IN).weight, module(stock, IMG_IN).weight
    assert weight.shape == (H, 128)
    assert torch.equal(weight.float(), want.float())
    assert relative_error(merged(patched, QKV), attached_weight(module(patched, QKV))) < 5e-7
    # While it is loaded, a LoRA for the model as it was still fits, and one for the widened layer fits behind
    # it alone.
    assert f"{IMG_IN}.weight" in with_lora(base, lora_on(QKV) | on(IMG_IN, "lora", (H, 64))).patches
    assert (
        len(with_lora(patched, lora_on(QKV) | on(IMG_IN, "lora", (H, 128))).patches[f"{IMG_IN}.weight"]) == 2
    )
    assert f"{IMG_IN}.weight" not in with_lora(base, lora_on(QKV) | on(IMG_IN, "lora", (H, 128))).patches
    load(full)
    assert torch.equal(forward(base), plain)
    assert module(base, IMG_IN).weight.shape == (H, 64)


def test_reshaped_packed_layer_is_refused(base):
    """Whatever else fits: a file that widens a layer is worth nothing without it."""
    with pytest.raises(
        RuntimeError,
        match=rf"{QKV}.weight: a patch that reshapes the weight to 768 x 512 cannot be put on this quantized",
    ):
        with_lora(base, lora_on(MLP, LINEAR2) | reshaping(QKV, (768, 512), (768, 512)))
    padded = ("diff", (randn(768, 512), {"pad_weight": True}))
    with pytest.raises(RuntimeError, match=r"a patch that reshapes the weight to 768 x 512 cannot be put"):
        base.clone().add_patches({f"{QKV}.weight": padded})


def test_difference_that_may_pad_and_need_not_is_a_difference(base):
    patched = base.clone()
    patched.add_patches({f"{QKV}.weight": ("diff", (randn(768, 256), {"pad_weight": True}))}, 0.5)
    load(patched)
    assert relative_error(merged(patched, QKV), attached_weight(module(patched, QKV))) < 5e-7
    load(base)


def test_layer_that_is_wider_already_is_refused_by_name(fill):
    """A control LoRA for FLUX dev on Fill: ComfyUI stops in the middle of the load, 'must be larger in all
    dimensions'."""
    with pytest.raises(
        RuntimeError,
        match=rf"{IMG_IN}.weight: a patch that reshapes the weight to 256 x 128, which has 256 x 384,",
    ):
        with_lora(fill, lora_on(QKV, MLP) | reshaping(IMG_IN, (H, 128), (H, 128)))


# -- the bypass loader


@pytest.mark.parametrize("misfit", ["turbo", "reshape", "packed"])
def test_bypass_lora_with_a_misfit_is_refused_before_the_sampler(comfy, fill, misfit):
    """ComfyUI's loader would add x times a matrix of another width in the middle of a step."""
    tensors = {
        "turbo": on(IMG_IN, "lora", (H, 64)),
        "reshape": reshaping(IMG_IN, (H, 448), (H, 448)),
        "packed": on(MLP, "lora", (H, H)),
    }[misfit]
    text = (
        r"1 key of the LoRA file made for layers of another shape, .* the sampler: "
        rf"{MLP if misfit == 'packed' else IMG_IN}.weight \(.*\)\. Load this LoRA with LoraLoaderModelOnly"
    )
    with pytest.raises(RuntimeError, match=text):
        bypass(comfy, fill, lora_on(QKV, LINEAR2) | tensors)


def test_bypass_lora_leaves_out_a_misfit_among_its_plain_patches(comfy, fill, caplog):
    """Differences go through add_patches there, one part of the file; by the rule for the whole of it."""
    tensors = lora_on(QKV, LINEAR2) | {f"{IMG_IN}.diff": randn(H, 64)}
    _, lines, _ = warnings(caplog, lambda: bypass(comfy, fill, tensors))
    assert lines == [
        f"Nibble: 1 key of the LoRA file left out, made for layers of another shape: {IMG_IN}.weight (a "
        "full difference of 256 x 64 on 256 x 384 weights)"
    ]
