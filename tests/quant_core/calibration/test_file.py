"""Damaged statistics are errors that name the file and what in it."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comfyui_nibble.quant_core.calibration.file import Calibration, CalibrationError, read_recorder, save
from comfyui_nibble.quant_core.calibration.trajectory import Recorder
from comfyui_nibble.quant_core.layer.statistics import InputStatistics

pytestmark = pytest.mark.quick

META = {"model": "m", "samples": 2, "done": 2, "passes": 1, "seed": 0}
SEEN = {"order": ["a"], "shared": {}, "rows": {"a": 4}}


@pytest.fixture
def path(tmp_path):
    g = torch.Generator().manual_seed(0)
    statistics = InputStatistics.empty("a", 128, ((0, 64), (64, 128)), 8)
    statistics.update(torch.randn(32, 128, generator=g))
    statistics.hold_out(
        torch.randn(8, 128, generator=g), torch.rand(8, generator=g, dtype=torch.float64), 0.5
    )
    recorder = Recorder()
    recorder.add(
        0, 1, 0, 0.5, True, (torch.randn(2, 3, generator=g),), {"guidance": 3.5, "y": {"c": torch.ones(1)}}
    )
    save(tmp_path / "c.safetensors", {"a": statistics}, META | {"observed": SEEN}, recorder)
    return tmp_path / "c.safetensors"


def rewrite(path, change_meta=None, change_tensors=None):
    with safe_open(path, "pt") as f:
        meta = json.loads(f.metadata()["nibble_calibration"])
    tensors = load_file(path)
    text = (change_meta(meta) if change_meta else None) or json.dumps(meta)
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, path, metadata={"nibble_calibration": text})


def test_a_sound_file_opens(path):
    calibration = Calibration(path)
    assert (calibration.get("a").count, len(calibration.get("a").tokens), calibration.meta["observed"]) == (
        32,
        8,
        SEEN,
    )
    args, kwargs = calibration.trajectory().arguments(0)
    assert (args[0].shape, kwargs["guidance"], kwargs["y"]["c"].tolist()) == ((2, 3), 3.5, [1.0])
    assert len(read_recorder(path).tensors) == 2


def set_in(*path_and_value):
    *names, last, value = path_and_value

    def change(meta):
        for name in names:
            meta = meta[name]
        meta[last] = value

    return change


def without(*names):
    def change(meta):
        *outer, last = names
        for name in outer:
            meta = meta[name]
        del meta[last]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: "{", "is not JSON"),
        (lambda m: "[1]", "expected an object, found list"),
        (lambda m: "[" * 100_000, "nested too deep"),
        (lambda m: '{"model": "a", "model": "b"}', "has 'model' twice in one object"),
        (set_in("version", 2), "version 2, this pack reads version 1"),
        (set_in("version", True), "version: expected a whole number, found True"),
        (without("model"), "model: expected text, found none"),
        (set_in("model", 1), "model: expected text, found 1"),
        (without("passes"), "passes: expected a whole number, found none"),
        (set_in("samples", "2"), "samples: expected a whole number, found '2'"),
        (set_in("done", -1), "done: expected a whole number from 0 to below 2147483648, found -1"),
        (set_in("done", 3), "done: 3 of 2 samples"),
        (without("inputs"), "inputs: expected an object, found none"),
        (set_in("inputs", "a", []), "input a: a: expected an object, found list of 0"),
        (set_in("inputs", "a", "width", "x"), "input a: width: expected a whole number, found 'x'"),
        (
            set_in("inputs", "a", "width", 127),
            r"input a: blocks: expected a range of channels from 64 to at most 127, found list of 2",
        ),
        (
            set_in("inputs", "a", "width", 192),
            "input a: blocks: expected ranges up to channel 192, found the last end at 128",
        ),
        (set_in("inputs", "a", "blocks", 5), "input a: blocks: expected a list, found 5"),
        (
            set_in("inputs", "a", "blocks", [1]),
            "input a: blocks: expected a range of channels from 0 to at most 128, found 1",
        ),
        (set_in("inputs", "a", "count", -1), "input a: count: expected a number of tokens, found -1"),
        (set_in("inputs", "a", "reservoir", None), "input a: reservoir: expected a whole number, found None"),
        (set_in("inputs", "a", "reservoir", 7), r"input a: \[8\] held-out tokens, .* up to 7"),
        (
            set_in("inputs", "b", {"width": 1, "blocks": [], "reservoir": 1, "count": 0}),
            r"the tensor b\|absmax is missing",
        ),
        (set_in("trajectory", {}), "trajectory: expected a list, found dict of 0"),
        (set_in("trajectory", [{"sample": 1}]), "trajectory, call 0: expected an object of sample, step"),
        (
            set_in("trajectory", 0, "held_out", 1),
            "trajectory, call 0: held_out: expected true or false, found 1",
        ),
        (
            set_in("trajectory", 0, "arguments", "args", [{"tensor": 1}]),
            "trajectory, call 0: tensor: expected text, found 1",
        ),
        (
            set_in("trajectory", 0, "arguments", "args", [{"tensor": "x"}]),
            r"the tensor trajectory\|x is missing",
        ),
        (
            set_in("trajectory", 0, "arguments", "kwargs", {"a": {"dict": 1}}),
            "dict: expected an object, found 1",
        ),
        (set_in("observed", "order", 1), "order: expected a list, found 1"),
        (set_in("observed", "order", [1]), "observed: expected names of layers"),
        (set_in("observed", "rows", {"b": 1}), "observed: 'rows' and 'order' differ"),
    ],
)
def test_a_damaged_header_names_the_file_and_the_field(path, change, message):
    rewrite(path, change)
    with pytest.raises(CalibrationError, match=f"calibration file .*c.safetensors: .*{message}"):
        Calibration(path)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("a|tokens", None, r"the tensor a\|tokens is missing"),
        ("a|hessian.64", None, r"the tensor a\|hessian.64 is missing"),
        ("a|hessian.0", torch.zeros(64, 63), r"a\|hessian.0: expected F32 \[64, 64\], found F32 \[64, 63\]"),
        (
            "a|absmax",
            torch.zeros(128, dtype=torch.float64),
            r"a\|absmax: expected F32 \[128\], found F64 \[128\]",
        ),
        (
            "a|tokens",
            torch.zeros(8, 127).bfloat16(),
            r"a\|tokens: expected BF16 \['any', 128\], found BF16 \[8, 127\]",
        ),
        (
            "a|keys",
            torch.zeros(7, dtype=torch.float64),
            r"input a: \[7, 8\] held-out tokens, keys and timesteps",
        ),
    ],
)
def test_a_tensor_that_is_not_as_the_header_says_is_named_before_anything_is_read(path, key, tensor, message):
    rewrite(path, change_tensors=lambda t: t.pop(key) if tensor is None else t.update({key: tensor}))
    with pytest.raises(CalibrationError, match=f"c.safetensors: {message}"):
        Calibration(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0])
@pytest.mark.parametrize("key", ["a|absmax", "a|tokens", "a|hessian.64"])
def test_values_that_no_statistics_have_are_named_when_they_are_read(path, key, value):
    def change(tensors):
        tensors[key].view(-1)[0] = value

    rewrite(path, change_tensors=change)
    calibration = Calibration(path)
    if key == "a|tokens" and value == -1:
        assert calibration.get("a").tokens[0, 0] == -1
        return
    what = "holds a negative number|negative squares" if value == -1 else "holds NaN or Inf"
    with pytest.raises(CalibrationError, match=rf"c.safetensors: {key.replace('|', '[|]')}: ({what})"):
        calibration.get("a")


def test_names_in_errors_are_short_and_have_no_control_characters(path):
    rewrite(path, set_in("inputs", "\x1b[31m" + "x" * 100_000, 5))
    with pytest.raises(CalibrationError) as caught:
        Calibration(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert r"input \x1b[31mxxx" in str(caught.value)
