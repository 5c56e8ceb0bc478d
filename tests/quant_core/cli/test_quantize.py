"""`nibble quantize` on what a file may hold, and what it refuses before anything is computed."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comfyui_nibble.quant_core.calibration import Calibration, CalibrationError
from comfyui_nibble.quant_core.cli.quantize import quantize_file
from comfyui_nibble.quant_core.evaluation.demo import run, tiny_flux
from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.store.atomic import save_tensors
from comfyui_nibble.quant_core.training.presets import preset
from comfyui_nibble.quant_core.training.trainer import NoTrajectory
from comfyui_nibble.tests.support import nibble, relative_error

pytestmark = pytest.mark.quick

RTN = METHODS["rtn"]
REAL = {torch.float8_e4m3fn: torch.bfloat16, torch.float8_e5m2: torch.bfloat16, torch.float64: torch.float32}
DTYPES = [*REAL, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_in_any_float_dtype_is_quantized(tmp_path, tiny_state, dtype):
    """All of it in that dtype, biases and norms too."""
    state = {k: v.to(dtype) for k, v in tiny_state.items()}
    save_file(state, tmp_path / "m.safetensors")
    nibble("quantize", tmp_path / "m.safetensors", tmp_path / "q.safetensors", "--method", "rtn")
    file = PackFile(tmp_path / "q.safetensors")
    assert len(file.specs) == 16
    for key in file.rest:
        assert file.tensor(key).dtype == REAL.get(dtype, dtype)
        assert torch.equal(file.tensor(key).double(), state[key].double())
    layer, bias = file.layer("double_blocks.0.img_attn.qkv"), state["double_blocks.0.img_attn.qkv.bias"]
    assert layer.tensors["bias"].dtype == REAL.get(dtype, dtype)
    assert torch.equal(layer.tensors["bias"].double(), bias.double())
    assert relative_error(state["double_blocks.0.img_attn.qkv.weight"], layer.dequantize()) < 0.2


@pytest.mark.parametrize("option", [("--grid", "nvfp4"), ("--set", "grid=nvfp4")])
def test_the_nvfp4_grid(tmp_path, tiny_state, option):
    save_file(tiny_state, tmp_path / "m.safetensors")
    out = tmp_path / "q.safetensors"
    nibble("quantize", tmp_path / "m.safetensors", out, "--method", "convrot", *option)
    file = PackFile(out)
    assert file.provenance["settings"]["grid"] == "nvfp4"
    assert "W4A4 nvfp4 H256" in nibble("inspect", out)
    name = "double_blocks.0.img_attn.qkv"
    assert relative_error(tiny_state[f"{name}.weight"], file.layer(name).dequantize()) < 0.11
    assert file.layer(name).bits_per_weight < 5


@pytest.fixture
def untouched(tmp_path, monkeypatch):
    """The destination of a run that must not begin: nothing is read of the weights but for the fingerprint,
    and nothing is written."""
    destination = tmp_path / "q.safetensors"

    def begins(*args, **kwargs):
        raise AssertionError("a layer was fitted before the refusal")

    monkeypatch.setattr("comfyui_nibble.quant_core.run.model.quantize_blocks", begins)
    yield destination
    assert not (tmp_path / "q.safetensors.partial").exists()


def test_a_destination_that_cannot_be_written(tmp_path, untouched):
    untouched.mkdir()
    with pytest.raises(IsADirectoryError, match=r"q.safetensors: a folder"):
        quantize_file(tiny_flux.CHECKPOINT, untouched, RTN, RTN.config)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"file/q.safetensors: cannot be written"):
        quantize_file(tiny_flux.CHECKPOINT, tmp_path / "file" / "q.safetensors", RTN, RTN.config)


def test_the_source_as_destination(tmp_path, untouched, tiny_state):
    save_file(tiny_state, tmp_path / "m.safetensors")
    with pytest.raises(
        ValueError, match=r"m.safetensors: is read by this command .*Name another file to write"
    ):
        quantize_file(tmp_path / "m.safetensors", tmp_path / "m.safetensors", RTN, RTN.config)
    assert load_file(tmp_path / "m.safetensors").keys() == tiny_state.keys()


def test_training_without_a_calibration(untouched):
    method = METHODS["splitquant"]
    with pytest.raises(NoTrajectory, match="training needs a calibration, found none"):
        quantize_file(
            tiny_flux.CHECKPOINT, untouched, method, method.config, preset=preset("splitquant", "standard")
        )


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    layers = FLUX.layers(Checkpoint(tiny_flux.CHECKPOINT).shapes)
    fingerprint = Checkpoint(tiny_flux.CHECKPOINT).fingerprint()
    return run.calibrate_tiny(
        tiny_flux.load(), layers, tmp_path_factory.mktemp("c"), steps=1, samples=1, model_hash=fingerprint
    )


def narrower(inputs, tensors):
    """Another model's last layer, of 640 in-channels."""
    name = "single_blocks.1.linear2"
    blocks = [[a, min(b, 640)] for a, b in inputs[name]["blocks"] if a < 640]
    inputs[name] |= {"width": 640, "blocks": blocks}
    for key in [k for k in tensors if k.startswith(f"{name}|hessian.")]:
        hessian, width = tensors.pop(key), {a: b - a for a, b in blocks}.get(int(key.rpartition(".")[2]))
        if width:
            tensors[key] = hessian[:width, :width].contiguous()
    for leaf in ("absmax", "tokens"):
        tensors[f"{name}|{leaf}"] = tensors[f"{name}|{leaf}"][..., :640].contiguous()


def altered(calibration, folder, change) -> Calibration:
    """The calibration with `change` made on the table of its inputs and its tensors."""
    file = next(calibration.path.glob("*.safetensors"))
    with safe_open(file, "pt") as f:
        header = json.loads(f.metadata()["nibble_calibration"])
    tensors = load_file(file)
    change(header["inputs"], tensors)
    save_tensors(folder / file.name, tensors, {"nibble_calibration": json.dumps(header)})
    return Calibration(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (narrower,
        r"layer single_blocks.1.linear2: calibration .* observed 640 in-channels, the weight has 1280"),
        (lambda inputs, _: inputs.pop("single_blocks.1.linear2"),
        "no statistics of layer single_blocks.1.linear2"),
    ],
)  # fmt: skip
def test_a_calibration_that_does_not_fit_the_last_layer(calibration, tmp_path, untouched, change, message):
    with pytest.raises(CalibrationError, match=message):
        quantize_file(
            tiny_flux.CHECKPOINT, untouched, RTN, RTN.config, altered(calibration, tmp_path / "c", change)
        )
