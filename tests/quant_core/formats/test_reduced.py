"""Checkpoints in fp8, mxfp8 and GGUF as models: W8A8 behind a rotation, near what they hold."""

import gguf
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import save_file

from comfyui_nibble.quant_core.convert.convert import convert
from comfyui_nibble.quant_core.convert.convert import plan as conversion
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.detect import FULL, kind_of, open_quantized
from comfyui_nibble.quant_core.formats.kitchen.read import KitchenFile
from comfyui_nibble.quant_core.formats.nibble import PackError
from comfyui_nibble.quant_core.formats.reduced import ReducedFile
from comfyui_nibble.tests.assets.kitchen import marker
from comfyui_nibble.tests.assets.synthetic import flux_shapes, random_state
from comfyui_nibble.tests.quant_core.formats.test_gguf_file import write as write_gguf
from comfyui_nibble.tests.support import outlier_tokens, relative_error

pytestmark = pytest.mark.quick
Q4 = gguf.GGMLQuantizationType.Q4_0
MLP = "double_blocks.0.img_mlp.2"


@pytest.fixture(scope="module")
def state():
    return random_state(flux_shapes(1, 0, 256, 64, 64))


def fp8(tensor):
    scale = tensor.abs().amax().float() / 448
    return (tensor.float() / scale).to(torch.float8_e4m3fn), scale


def plain(path, state):
    save_file({k: t.to(torch.float8_e4m3fn) for k, t in state.items()}, path)


def scaled(path, state):
    """As ComfyUI's older files are."""
    out = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, tensor in state.items():
        if key.endswith(".weight") and tensor.ndim == 2:
            out[key], out[f"{key.removesuffix('.weight')}.scale_weight"] = fp8(tensor)
        else:
            out[key] = tensor
    save_file(out, path)


def declared(path, state, layout="TensorCoreMXFP8Layout", kind="mxfp8"):
    out = {}
    for key, tensor in state.items():
        if key.endswith(".weight") and "mlp" in key:
            found = QuantizedTensor.from_float(tensor.float(), layout).state_dict("weight")
            name = key.removesuffix(".weight")
            out |= {f"{name}.{leaf}": t.contiguous() for leaf, t in found.items()}
            out[f"{name}.comfy_quant"] = marker({"format": kind})
        else:
            out[key] = tensor
    save_file(out, path)


def ggml(path, state):
    write_gguf(path, state, {k: Q4 for k, t in state.items() if "_blocks." in k and t.ndim == 2})


# {case: (who writes it, its layers)}
CASES = {"fp8": (plain, 10), "scaled fp8": (scaled, 10), "mxfp8": (declared, 4), "GGUF": (ggml, 10)}


@pytest.mark.parametrize("case", CASES)
def test_layers_are_near_what_the_file_holds(tmp_path, state, case):
    """1.3 %: 0.9 each of a weight and of x, whose channels differ by a factor of 40."""
    write, count = CASES[case]
    path = tmp_path / ("m.gguf" if write is ggml else "m.safetensors")
    write(path, state)
    assert kind_of(path) == FULL  # a source, too
    model, source = open_quantized(path), Checkpoint(path)
    assert isinstance(model, ReducedFile)
    assert len(model.specs) == count
    assert {key.rpartition(".")[0] for key in model.rest}.isdisjoint(model.specs)
    for name, spec in model.specs.items():
        layer = model.sound_layer(name)
        assert layer.spec == spec
        assert spec.precision == ("W8A16" if spec.weight_only else "W8A8")
        weight = source.get(f"{name}.weight").float()
        x = outlier_tokens(37, spec.in_features, 5, strength=8.0)
        want = x @ weight.T + source.get(f"{name}.bias").float()
        assert relative_error(want, layer(x)) < 0.016, name
        assert 0.004 < relative_error(weight, layer.dequantize()) < 0.011
    for key in model.rest:
        assert torch.equal(model.tensor(key), source.get(key))
        assert model.shape(key) == tuple(source.shapes[key])


def test_notes_and_what_stays(tmp_path, state):
    """What the file's maker has left in 16 bit stays so."""
    declared(tmp_path / "m.safetensors", state)
    model = open_quantized(tmp_path / "m.safetensors")
    assert model.kind == "checkpoint below 16 bit (4 weights in mxfp8)"
    (note,) = model.notes
    assert note.startswith("layers in 4 weights in mxfp8 are rounded to int8 behind a rotation (4 as W8A8)")
    assert "double_blocks.0.img_attn.qkv.weight" in model.rest


def test_it_is_written_for_stock_comfyui(tmp_path, state):
    """As int8_tensorwise, exactly what it was as a model."""
    scaled(tmp_path / "m.safetensors", state)
    source = open_quantized(tmp_path / "m.safetensors")
    planned = conversion(source, "native")
    assert planned.lossy == {}
    convert(planned, tmp_path / "out.safetensors", lossy=True)
    made = open_quantized(tmp_path / "out.safetensors")
    assert isinstance(made, KitchenFile)
    assert made.specs == source.specs
    for key, tensor in source.layer(MLP).tensors.items():
        assert torch.equal(made.layer(MLP).tensors[key].float(), tensor.float())


@pytest.mark.parametrize("embedder", [False, True])
def test_a_file_without_such_layers_is_none(tmp_path, state, embedder):
    changed = {"img_in.weight": state["img_in.weight"].to(torch.float8_e4m3fn)} if embedder else {}
    save_file(state | changed, tmp_path / "m.safetensors")
    with pytest.raises(PackError, match="not a quantized model that this pack knows"):
        open_quantized(tmp_path / "m.safetensors")
