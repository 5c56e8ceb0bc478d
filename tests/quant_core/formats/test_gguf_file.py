"""GGUF files as sources: the tensors that the package gguf gives, in the shapes of the model."""

import sys

import gguf
import numpy as np
import pytest
import torch

from comfyui_nibble.quant_core.convert.inspect import describe
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.detect import FULL, kind_of, open_quantized
from comfyui_nibble.quant_core.formats.kitchen.dense import lost_text
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.quant_core.store.safe import CheckpointError
from comfyui_nibble.tests.assets.synthetic import flux_shapes, random_state
from comfyui_nibble.tests.support import nibble, relative_error

pytestmark = pytest.mark.quick

Q8, Q4 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0
LAYER = "double_blocks.0.img_mlp.2.weight"
QUANTIZED = {LAYER: Q4, "double_blocks.0.img_mlp.0.weight": Q8}


@pytest.fixture(scope="module")
def state():
    return random_state(flux_shapes(1, 0, 256, 64, 64))


def write(path, state, quantized=QUANTIZED, reshaped=()):
    """As ComfyUI-GGUF's converter does: vectors in fp32, the rest as `quantized` says, else in bf16."""
    writer = gguf.GGUFWriter(path, "flux")
    for key, tensor in state.items():
        values = tensor.float().numpy()
        if key in reshaped:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", [int(n) for n in values.shape])
            values = values.reshape(-1, 32)
        kind = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else gguf.GGMLQuantizationType.BF16
        kind = quantized.get(key, kind)
        writer.add_tensor(key, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_values_and_shapes(tmp_path, state):
    path = write(tmp_path / "m.gguf", state, reshaped=[LAYER])
    assert kind_of(path) == FULL
    found = Checkpoint(path)
    assert found.family.name == "flux"
    assert found.shapes == {key: tuple(t.shape) for key, t in state.items()}
    assert found.reduced == "1 weights in Q4_0, 1 weights in Q8_0"
    for key, tensor in state.items():
        if key not in QUANTIZED:
            assert torch.equal(found.get(key).float(), tensor.float()), key
    for key, kind in QUANTIZED.items():
        want = gguf.dequantize(gguf.quantize(state[key].float().numpy(), kind), kind)
        assert torch.equal(found.get(key), torch.from_numpy(want).bfloat16())
    assert 0.04 < relative_error(state[LAYER], found.get(LAYER)) < 0.12
    # 18 and 34 bytes for 32 values
    sizes = [state[key].numel() for key in QUANTIZED]
    assert found.saved == sizes[0] * (2 - 18 / 32) + sizes[1] * (2 - 34 / 32)


def test_it_is_quantized_and_described(tmp_path, state):
    path, out = write(tmp_path / "m.gguf", state), tmp_path / "q.safetensors"
    nibble("quantize", path, out, "--method", "rtn")
    said = lost_text(Checkpoint(path).kinds)
    assert "The source has 1 weights in Q4_0, 1 weights in Q8_0: what rounding to that has lost" in said
    assert PackFile(out).provenance["model"] == Checkpoint(path).fingerprint()
    assert describe(path)["below 16 bit"] == "1 weights in Q4_0, 1 weights in Q8_0"
    assert open_quantized(path).specs.keys() == {key.removesuffix(".weight") for key in QUANTIZED}


def test_damaged_files_are_named(tmp_path, state):
    whole = write(tmp_path / "m.gguf", state).read_bytes()
    for name, content in {
        "cut": whole[: len(whole) // 2],
        "header": whole[:200],
        "zeros": b"GGUF" + bytes(100),
        "counts": whole[:8] + np.array([2**60, 2**60], np.uint64).tobytes() + whole[24:],
    }.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}.gguf: not a whole GGUF file .*Download it again"):
            Checkpoint(path)


def test_a_shape_that_does_not_fit(tmp_path, state):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "flux")
    writer.add_array(f"comfy.gguf.orig_shape.{LAYER}", [3, 5])
    writer.add_tensor(LAYER, state[LAYER].float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"orig_shape is \(3, 5\), the tensor has \(256, 1024\)"):
        Checkpoint(tmp_path / "m.gguf")


def test_without_the_package(tmp_path, state, monkeypatch):
    path = write(tmp_path / "m.gguf", state)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"m.gguf: a GGUF file. .*needs the package gguf: python -m pip"):
        Checkpoint(path)
