import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comfyui_nibble.quant_core.families import Part, UnknownArchitecture
from comfyui_nibble.quant_core.formats import nibble
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.origin import Origin
from comfyui_nibble.quant_core.layer.row import Row
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.store.safe import CheckpointError

ORIGIN = Origin(
    {"config": '{"transformer": {}}'},
    {
        "class": "X",
        "unet_config": {
            "patch": (1, 2, [3.5, None]),
            "precision": torch.float32,
            "heads": {0: True},
            "max": float("inf"),
        },
    },
    {"v_pred": torch.empty(0)},
)


@pytest.fixture
def layer(make_problem):
    problem = make_problem(64, 320, (Part(0, 64), Part(64, 320, after_gelu=True)), fit_tokens=512)
    return METHODS["svdquant"].fit(problem, METHODS["svdquant"].configured(rank=8)).layer


@pytest.fixture
def saved(layer, tmp_path):
    path = tmp_path / "model.safetensors"
    rest, report = (
        {"img_in.weight": torch.ones(4, 4)},
        [Row(layer.name, "blocks.0", 64, 64, "16 bit").to_json()],
    )
    nibble.save(path, {layer.name: layer}, rest, "flux", {"method": "svdquant"}, report, origin=ORIGIN)
    return path


def rewrite(path, change_header=None, change_tensors=None):
    with safe_open(path, "pt") as f:
        header = json.loads(f.metadata()["nibble"])
    tensors = load_file(path)
    if change_header:
        header = change_header(header) or header
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, path, metadata={"nibble": header if isinstance(header, str) else json.dumps(header)})


def test_round_trip_is_bit_exact(layer, saved):
    opened = nibble.PackFile(saved)
    again = opened.layer(layer.name)
    assert again.spec == layer.spec
    assert all(
        torch.equal(again.tensors[k], t) and again.tensors[k].dtype == t.dtype
        for k, t in layer.tensors.items()
    )
    assert opened.rest == ["img_in.weight"]  # and nothing of what stops other loaders
    assert opened.origin.metadata == ORIGIN.metadata
    assert opened.origin.host == ORIGIN.host
    assert torch.equal(opened.origin.beside["v_pred"], ORIGIN.beside["v_pred"])
    assert (opened.family, opened.provenance, opened.report) == (
        "flux",
        {"method": "svdquant"},
        [Row(layer.name, "blocks.0", 64, 64, "16 bit").to_json()],
    )


@pytest.fixture
def ternary(make_problem):
    """Two parts, 64 and 256 in-channels: 320 codes, 64 bytes a row, and one of 192: 39 bytes with a code
    over."""
    parts = (Part(0, 64), Part(64, 320, after_gelu=True))
    config = METHODS["robuq"].configured(rank=8, gptq=False, iterations=0)
    layers = [
        METHODS["robuq"].fit(make_problem(48, k, p, calibrated=False), config).layer
        for k, p in ((320, parts), (192, None))
    ]
    return {name: replace(layer, name=name) for name, layer in zip(("two", "one"), layers, strict=True)}


def test_base_3_gives_the_same_layers(ternary, layer, tmp_path):
    layers = ternary | {layer.name: layer}
    for base3 in (False, True):
        nibble.save(tmp_path / f"{base3}", layers, {}, "flux", {}, [], base3)
    plain, small = nibble.PackFile(tmp_path / "False"), nibble.PackFile(tmp_path / "True")
    assert small.base3 == set(ternary)  # and not the layer of 4 bits
    assert not plain.base3
    assert small.logical_shapes() == plain.logical_shapes()
    for name in layers:
        a, b = plain.layer(name), small.layer(name)
        assert a.spec == b.spec
        assert all(
            torch.equal(a.tensors[k], b.tensors[k]) and a.tensors[k].dtype == b.tensors[k].dtype
            for k in a.tensors
        )
    stored = load_file(tmp_path / "True")
    assert {n: tuple(stored[f"{n}.weight"].shape) for n in ternary} == {"two": (48, 64), "one": (48, 39)}


def test_two_bits_that_are_no_trits_stay_two_bits(ternary, tmp_path):
    one = ternary["one"]
    weight = one.tensors["weight"].clone()
    weight[3, 5] = 0b10  # the code -2
    nibble.save(
        tmp_path / "m",
        {"one": replace(one, tensors=one.tensors | {"weight": weight})},
        {},
        "flux",
        {},
        [],
        base3=True,
    )
    opened = nibble.PackFile(tmp_path / "m")
    assert not opened.base3
    assert torch.equal(opened.layer("one").tensors["weight"], weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t[:, :-1].contiguous(),
            r"one.weight: expected the shape \(48, 39\) from the header, found \(48, 38\)",
        ),
        (lambda t: t.view(torch.int8), "layer one: weight in base 3 has the dtype torch.int8"),
        (
            lambda t: torch.full_like(t, 243),
            "layer one: weight: five trits are a byte of at most 242, found 243",
        ),
    ],
)
def test_unsound_base_3(ternary, tmp_path, change, message):
    nibble.save(tmp_path / "m", ternary, {}, "flux", {}, [], base3=True)
    rewrite(tmp_path / "m", change_tensors=lambda t: t.update({"one.weight": change(t["one.weight"])}))
    with pytest.raises(nibble.PackError, match=f"m: {message}"):
        nibble.PackFile(tmp_path / "m").layer("one")


def test_logical_shapes_are_those_before_quantization(layer, saved):
    assert nibble.PackFile(saved).logical_shapes() == {
        f"{layer.name}.weight": (64, 320),
        f"{layer.name}.bias": (64,),
        "img_in.weight": (4, 4),
    }


def test_tensor_given_twice_is_refused(layer, tmp_path):
    with pytest.raises(ValueError, match="given twice"):
        nibble.save(
            tmp_path / "x", {layer.name: layer}, {f"{layer.name}.bias": torch.zeros(1)}, "flux", {}, []
        )


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        (
            lambda h: h.update(version=5),
            None,
            r"model.safetensors: format version 5; this version of the pack reads up to 4\. Update",
        ),
        (
            lambda h: h.update(version=1, base3=["a"]),
            None,
            r"'base3': expected names of layers in a file of version 2",
        ),
        (lambda h: h.update(version=2, base3="a"), None, "'base3': expected names of layers"),
        (lambda h: h.update(version=2, base3=[1]), None, "'base3': expected names of layers"),
        (lambda h: h.update(version=2, base3=["x"]), None, "in base 3 that the header does not describe: x"),
        (
            lambda h: h.update(version=2, base3=["blocks.0.linear"]),
            None,
            "layer blocks.0.linear is said to be in base 3, which takes weights of 2",
        ),
        (
            lambda h: h.update(version="x"),
            None,
            "header entry 'nibble': version: expected a whole number, found 'x'",
        ),
        (
            lambda h: {k: v for k, v in h.items() if k != "layers"},
            None,
            "header entry 'nibble': layers: expected an object, found none",
        ),
        (lambda h: "not json", None, "not JSON"),
        (
            lambda h: '{"a":' * 70 + "1" + "}" * 70,
            None,
            "header entry 'nibble': nested too deep, expected at most 64 levels",
        ),
        (lambda h: "[" * 100_000, None, "header entry 'nibble': nested too deep, expected at most 64 levels"),
        (
            lambda h: '{"version": 1, "version": 2}',
            None,
            "header entry 'nibble': has 'version' twice in one object",
        ),
        (lambda h: h.update(family="\ud800"), None, "header entry 'nibble': holds half of a surrogate pair"),
        (
            lambda h: h.update(version=True),
            None,
            "header entry 'nibble': version: expected a whole number, found True",
        ),
        (
            lambda h: h.update(version=0),
            None,
            "header entry 'nibble': version: expected a whole number from 1 to below 2147483648, found 0",
        ),
        (lambda h: h.update(family="\x1b[2J"), None, r"unknown model family '\\x1b\[2J'"),
        (lambda h: h.update(report=[1]), None, "header entry 'report', row 0: expected an object, found 1"),
        (
            lambda h: h["report"][0].pop("block") and None,
            None,
            "header entry 'report', row 0: layer blocks.0.linear: block: expected text, found none",
        ),
        (
            lambda h: h["report"][0].update(sqnr_db="x"),
            None,
            "sqnr_db: expected a whole number or a number or null, found 'x'",
        ),
        (lambda h: h["report"][0].update(nbytes=-1), None, "nbytes: expected a number of bytes, found -1"),
        (
            lambda h: h["layers"].update(a=[]),
            None,
            "description of layer a: LinearSpec: expected an object, found list",
        ),
        (
            lambda h: h["layers"]["blocks.0.linear"].update(in_features=10**40),
            None,
            "LinearSpec.in_features: 10+ is out of range",
        ),
        (
            lambda h: h["layers"]["blocks.0.linear"]["parts"][0].update(kronecker=["a", 2]),
            None,
            "kronecker must be a list of sizes",
        ),
        (
            lambda h: h["layers"]["blocks.0.linear"]["parts"][0].update(rotation=3),
            None,
            "a power of two from 2 to 4096, found 3",
        ),
        (
            lambda h: h["layers"]["blocks.0.linear"]["parts"][0]["activation"].update(shift=1e999),
            None,
            "ActivationSpec.shift: expected a finite",
        ),
        (lambda h: "[1]", None, "header entry 'nibble': expected an object, found list"),
        (
            lambda h: h["layers"]["blocks.0.linear"]["parts"][0].update(rank=-1),
            None,
            "layer blocks.0.linear: rank and rotation",
        ),
        (None, lambda t: t.pop("blocks.0.linear.proj_up"), "blocks.0.linear.proj_up is missing"),
        (
            None,
            lambda t: t.update({"blocks.0.linear.bias": torch.zeros(3)}),
            r"blocks.0.linear.bias: expected the shape \(64,\) .*found \(3,\)",
        ),
    ],
)
def test_unsound_files_name_file_and_key(saved, header, tensors, message):
    rewrite(saved, header, tensors)
    with pytest.raises(nibble.PackError, match=message):
        nibble.PackFile(saved)


def test_wrong_dtype_is_named_when_the_layer_is_read(saved):
    rewrite(
        saved,
        change_tensors=lambda t: t.update(
            {"blocks.0.linear.weight_scale": torch.zeros(5, 64, dtype=torch.int8)}
        ),
    )
    with pytest.raises(
        nibble.PackError,
        match=r"model.safetensors: layer blocks.0.linear: weight_scale has the dtype torch.int8",
    ):
        nibble.PackFile(saved).layer("blocks.0.linear")


def test_full_precision_file_is_not_a_pack(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(nibble.PackError, match=r"a.safetensors: .* not one written by Nibble"):
        nibble.PackFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize("reader", [Checkpoint, nibble.PackFile])
def test_files_that_are_not_safetensors(tmp_path, reader, saved):
    whole = saved.read_bytes()
    cases = {
        "cut.safetensors": (whole[: len(whole) // 2], "not a whole safetensors file"),
        "empty.safetensors": (b"", "not a whole safetensors file"),
        "text.safetensors": (b"<html>Not found</html>", "not a whole safetensors file"),
        "m.gguf": (b"GGUF" + bytes(60), "(not a whole|a) GGUF file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name}: {message}"):
            reader(tmp_path / name)
    with pytest.raises(CheckpointError, match="gone.safetensors: not found"):
        reader(tmp_path / "gone.safetensors")


def test_pickles_are_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (tmp_path / "old.ckpt").write_bytes(pickle.dumps(Bomb(), protocol=4))
    torch.save({"w": torch.zeros(1)}, tmp_path / "new.ckpt")
    for name in ("old.ckpt", "new.ckpt"):
        with pytest.raises(CheckpointError, match=f"{name}: a pickled PyTorch file"):
            Checkpoint(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_failed_save_keeps_the_old_file(saved, layer):
    before = saved.read_bytes()
    with pytest.raises(TypeError):
        nibble.save(saved, {layer.name: layer}, {}, "flux", {"bad": object()}, [])
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_unknown_architecture_lists_what_is_supported(tmp_path):
    state = {"layers.0.mlp.weight": torch.zeros(2, 2), "norm.weight": torch.ones(2)}
    save_file(state, tmp_path / "llm.safetensors")
    with pytest.raises(
        UnknownArchitecture, match=r"such as layers.0.mlp.weight.*Supported: FLUX.1, .*PixArt"
    ):
        Checkpoint(tmp_path / "llm.safetensors")
