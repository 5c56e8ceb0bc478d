"""Each family's map against ComfyUI's own model class: what ComfyUI makes of a checkpoint's shapes, on the
meta device, and small models."""

import pytest
import torch

from comfyui_nibble.quant_core.families import detect
from comfyui_nibble.quant_core.methods import by_name
from comfyui_nibble.quant_core.run.layers import quantize_layers
from comfyui_nibble.quant_core.run.source import Tensors
from comfyui_nibble.tests.assets.synthetic import (
    chroma_shapes,
    flux2_shapes,
    flux_shapes,
    pixart_shapes,
    qwen_image_shapes,
    random_state,
    sd3_shapes,
    sdxl_shapes,
    wan_shapes,
    z_image_shapes,
)
from comfyui_nibble.tests.host.inside import patcher_of
from comfyui_nibble.tests.host.narrow import widths_from_weights
from comfyui_nibble.tests.support import relative_error

_FLUX = {"img_in", "txt_in", "time_in.", "vector_in.", "final_layer."}
_FLUX2 = {"img_in", "txt_in", "time_in.", "final_layer."}
_WAN = {"text_embedding.", "time_embedding.", "head.head"}
_SDXL = {"time_embed.", "label_emb.", "emb_layers.1"}
_SDXL_SHAPES = {
    "down": (0, 0, 2, 2, 10, 10),
    "middle": 10,
    "up": (10, 10, 10, 2, 2, 2, 0, 0, 0),
    "widths": (1, 2, 4),
}
_SD3 = {"context_embedder", "t_embedder.", "y_embedder.", "final_layer."}
# name: (family, shapes, parts of the names of all linear layers that stay in 16 bit)
CASES = {
    "flux dev, kontext": ("flux", flux_shapes(2, 2), _FLUX | {"guidance_in."}),
    "flux schnell": ("flux", flux_shapes(2, 2, guidance=False), _FLUX),
    "flux fill": ("flux", flux_shapes(2, 2, channels=384), _FLUX | {"guidance_in."}),
    "flux.2 dev": ("flux2", flux2_shapes(2, 2), _FLUX2 | {"guidance_in."}),
    "flux.2 klein 4B": ("flux2", flux2_shapes(2, 2, hidden=3072, context=7680, guidance=False), _FLUX2),
    "chroma": ("chroma", chroma_shapes(2, 2), {"img_in", "txt_in", "distilled_guidance_layer.", "final_layer.linear"}),
    "chroma radiance": (
        "chroma",
        chroma_shapes(2, 2, radiance=True),
        {"txt_in", "distilled_guidance_layer.", "nerf_image_embedder.", "nerf_blocks."},
    ),
    "pixart": ("pixart", pixart_shapes(2), {"t_embedder.", "y_embedder.", "csize_embedder.", "ar_embedder.", "final_layer.linear"}),
    "sd3.5 medium": ("sd3", sd3_shapes(24, twice=13, positions=384), _SD3 | {"joint_blocks.23.context_block.adaLN_modulation.1"}),
    "sd3.5 large": ("sd3", sd3_shapes(38, positions=192), _SD3 | {"joint_blocks.37.context_block.adaLN_modulation.1"}),
    "sd3 medium": ("sd3", sd3_shapes(24, norm=False, positions=192), _SD3 | {"joint_blocks.23.context_block.adaLN_modulation.1"}),
    "qwen-image": ("qwen_image", qwen_image_shapes(2), {"time_text_embed.", "img_in", "txt_in", "norm_out.linear", "proj_out"}),
    "z-image": ("z_image", z_image_shapes(2), {"x_embedder", "t_embedder.", "cap_embedder.1", "final_layer."}),
    "wan 1.3B": ("wan", wan_shapes(2, 1536, 8960), _WAN),
    "wan 14B": ("wan", wan_shapes(2, 5120, 13824), _WAN),
    "wan 2.1 14B i2v": ("wan", wan_shapes(2, 5120, 13824, channels=36, image=True), _WAN | {"img_emb."}),
    "wan 2.2 14B i2v": ("wan", wan_shapes(2, 5120, 13824, channels=36), _WAN),
    "wan 2.2 5B": ("wan", wan_shapes(2, 3072, 14336, channels=48, out=48), _WAN),
    "wan vace 14B": ("wan_vace", wan_shapes(2, 5120, 13824, vace=2), _WAN),
    "sdxl": ("sdxl", sdxl_shapes(**_SDXL_SHAPES), _SDXL),
    "koala": ("sdxl", sdxl_shapes(), _SDXL),
}  # fmt: skip
EXTRA = {
    "pixart": {"csize_embedder", "ar_embedder", "pos_embed", "y_embedder"}
}  # ComfyUI makes these whether a file has them or not


@pytest.fixture(scope="module")
def comfyui_model(comfy):
    """shapes -> (the model that ComfyUI detects in them, on `device`, its checkpoint on the meta device under
    the model's own names)."""
    import comfy.model_detection as detection

    def make(shapes, device="meta"):
        meta = {k: torch.empty(s, dtype=torch.bfloat16, device="meta") for k, s in shapes.items()}
        config = detection.model_config_from_unet(dict(meta), "")
        assert config is not None, "ComfyUI detects nothing"
        config.set_inference_dtype(torch.float32, None)
        meta = config.process_unet_state_dict(meta)
        return config.get_model(meta, "", device=device), meta

    return make


def _is_one_of(name, parts):
    return any(name == p or name.startswith(p) or f".{p}" in name for p in parts)


@pytest.mark.parametrize("case", CASES)
def test_every_linear_layer_is_named_once_or_kept(comfyui_model, case):
    expected, shapes, kept = CASES[case]
    model, as_comfyui = comfyui_model(shapes)
    network = model.diffusion_model
    state = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    # The synthetic checkpoint is the whole of ComfyUI's model.
    extra = {k for k in state.keys() - as_comfyui.keys() if k.split(".")[0] not in EXTRA.get(case, ())}
    assert not extra
    assert {k: tuple(v.shape) for k, v in as_comfyui.items()}.items() <= state.items()
    family = detect(shapes)
    assert family.name == detect(state).name == expected
    layers = {layer.name: layer for layer in family.layers(state)}
    assert len(layers) == len(family.layers(state))
    linear = {n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(layers) <= linear
    assert {n for n in linear if not _is_one_of(n, kept)} == set(layers)
    assert not any(_is_one_of(n, kept) for n in layers)
    # A shared input is a module of the same width, and shared by no layer that only looks alike.
    assert all(
        network.get_submodule(layer.input).in_features == layer.in_features for layer in layers.values()
    )
    assert all(layers[layer.input].input == layer.input for layer in layers.values())
    assert all(hasattr(network.get_submodule(layer.block), "forward") for layer in layers.values())


def _noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


_IMAGE, _VIDEO, _TEXT = _noise(1, 16, 12, 12), _noise(1, 16, 2, 8, 8), _noise(1, 10, 4096)
_GUIDED = {"context": _noise(1, 10, 64), "guidance": torch.tensor([3.5])}
# name: (shapes, first argument, the others but the time)
SMALL = {
    "flux": (flux_shapes(2, 2, hidden=128, context=64, pooled=32), _IMAGE, _GUIDED | {"y": _noise(1, 32)}),
    "flux2": (flux2_shapes(2, 2, hidden=128, context=64), _noise(1, 128, 6, 6), _GUIDED),
    "chroma": (chroma_shapes(2, 2, hidden=128, inner=64, context=64), _IMAGE, _GUIDED),
    "pixart": (pixart_shapes(2), _noise(1, 4, 36, 36), {"context": _TEXT}),
    "sd3": (sd3_shapes(3, twice=2), _IMAGE, {"context": _TEXT, "y": _noise(1, 2048)}),
    "qwen_image": (
        qwen_image_shapes(2, hidden=128, context=64),
        _VIDEO[:, :, :1],
        {"context": _noise(1, 10, 64)},
    ),
    "z_image": (
        z_image_shapes(2, hidden=256, context=64),
        _IMAGE,
        {"context": _noise(1, 10, 64), "num_tokens": 10},
    ),
    "wan": (wan_shapes(2), _VIDEO, {"context": _TEXT}),
    "wan i2v": (
        wan_shapes(2, channels=36, image=True),
        _noise(1, 36, 2, 8, 8),
        {"context": _TEXT, "clip_fea": _noise(1, 7, 1280)},
    ),
    "wan_vace": (
        wan_shapes(2, vace=2),
        _VIDEO,
        {"context": _TEXT, "vace_context": _noise(1, 1, 96, 2, 8, 8), "vace_strength": [1.0]},
    ),
    "sdxl": (sdxl_shapes(), _noise(1, 4, 16, 16), {"context": _noise(1, 10, 2048), "y": _noise(1, 2816)}),
}


@pytest.mark.parametrize("case", SMALL)
def test_a_forward_pass_is_as_the_family_says(comfyui_model, monkeypatch, one_thread, case):
    """Which inputs are one tensor and which are not, which come out of a GELU, which see one row a picture,
    and the order of the blocks."""
    import comfy.model_detection as detection

    monkeypatch.setattr(detection, "detect_unet_config", widths_from_weights(detection.detect_unet_config))
    shapes, x, others = SMALL[case]
    model, _ = comfyui_model(shapes, "cpu")
    network = model.diffusion_model.float()
    state = random_state({k: tuple(v.shape) for k, v in network.state_dict().items()}, dtype=torch.float32)
    network.load_state_dict(state)
    family = detect({k: tuple(v.shape) for k, v in state.items()})
    assert family.name == case.split()[0]
    seen, layers = (
        {},
        {layer.name: layer for layer in family.layers({k: tuple(v.shape) for k, v in state.items()})},
    )
    for name in layers:
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, args[0].clone())
        )
    with torch.inference_mode():
        out = network(x, torch.tensor([0.7]), transformer_options={}, **others)
    assert out.isfinite().all()
    assert set(seen) == set(layers)
    for layer in layers.values():
        for other in layers.values():
            same = seen[layer.name].shape == seen[other.name].shape and torch.equal(
                seen[layer.name], seen[other.name]
            )
            assert same == (layer.input == other.input), (layer.name, other.name)
        rows = seen[layer.name].reshape(-1, layer.in_features)
        assert layer.weight_only == (len(rows) == 1), layer.name
        for part in layer.parts:
            after_gelu = rows[:, part.start : part.stop].min() > -0.171
            assert part.after_gelu == after_gelu or layer.weight_only, layer.name
    if case != "wan_vace":  # its two lists take turns
        order = list(dict.fromkeys(layers[name].block for name in seen))
        assert order == list(dict.fromkeys(layer.block for layer in layers.values()))


def test_wans_mlp_computes_its_gelu_once(comfy, one_thread):
    """ComfyUI's MLP is a Sequential whose forward skips the GELU in it and computes its own: nothing may be
    left to the quantizer."""
    shapes, method = wan_shapes(), by_name("rtn")
    state = random_state(shapes)
    done = quantize_layers(detect(shapes).layers(shapes), Tensors(state), method, method.config)
    layers = {layer.name: layer for layer, _ in done}
    rest = {k: v for k, v in state.items() if k.rpartition(".")[0] not in layers}
    model = patcher_of(layers, rest, "wan").model.diffusion_model
    x = _noise(1, 5, 128)
    with torch.inference_mode():
        want = layers["blocks.0.ffn.2"](
            torch.nn.functional.gelu(layers["blocks.0.ffn.0"](x), approximate="tanh")
        )
        assert relative_error(want, model.blocks[0].ffn(x)) < 1e-5
