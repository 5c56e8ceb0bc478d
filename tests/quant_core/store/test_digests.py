import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comfyui_nibble.quant_core.cli.quantize import quantize_file
from comfyui_nibble.quant_core.convert.inspect import verified
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.formats.detect import open_quantized
from comfyui_nibble.quant_core.formats.nibble import PackError, PackFile
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.store import digests
from comfyui_nibble.quant_core.store.atomic import save_tensors
from comfyui_nibble.quant_core.store.safe import CheckpointError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "q.safetensors"
    rtn = METHODS["rtn"]
    quantize_file(tiny_flux.CHECKPOINT, path, rtn, rtn.config)
    return path


@pytest.fixture
def copy(made, tmp_path):
    (tmp_path / "q.safetensors").write_bytes(made.read_bytes())
    return tmp_path / "q.safetensors"


def check(path):
    with safe_open(path, "pt") as file:
        return digests.verify(path, file)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def header_bytes(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_has_a_hash(tmp_path, dtype):
    tensors = {
        "a": torch.arange(24).to(torch.float32).view(4, 6).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
    }
    save_tensors(tmp_path / "t", tensors, {"about": "x"})
    assert check(tmp_path / "t") == sum(t.nbytes for t in tensors.values())
    flip(tmp_path / "t", 8 * header_bytes(tmp_path / "t") + 3)
    with pytest.raises(
        CheckpointError,
        match=r"t: 1 of 3 tensors are not what was written: (a|scalar)\. Download it or make it again",
    ):
        check(tmp_path / "t")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_of_the_data_is_found(copy, made, where, bit):
    copy.write_bytes(made.read_bytes())
    start, size = header_bytes(copy), copy.stat().st_size
    flip(copy, 8 * (start + int(where * (size - start))) + bit)
    with pytest.raises(CheckpointError, match=r"q.safetensors: 1 of \d+ tensors are not what was written: "):
        check(copy)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_of_the_header_is_found_or_changes_nothing(copy, made, where, bit):
    copy.write_bytes(made.read_bytes())
    flip(copy, 8 * int(where * header_bytes(copy)) + bit)
    try:
        check(copy)
    except (CheckpointError, ValueError, OSError):
        return
    except Exception as error:
        assert "Safetensor" in type(error).__name__  # noqa: PT017 - as open_safetensors names it
        return
    # Blanks that pad the header, and escapes of one character, may be another way to write the same.
    a, b = PackFile(made), PackFile(copy)
    assert (a.specs, a.provenance, a.report, a.rest) == (b.specs, b.provenance, b.report, b.rest)


def rewritten(path, **entries):
    """The file with other header entries, those that are None left out; with the hashes that it had."""
    with safe_open(path, "pt") as f:
        metadata = f.metadata() | entries
    save_file(load_file(path), path, {k: v for k, v in metadata.items() if v is not None})


def test_a_changed_description_is_an_error_at_opening(copy):
    with safe_open(copy, "pt") as f:
        text = f.metadata()["nibble"]
    rewritten(
        copy,
        nibble=text.replace('"samples": ', '"samples":  ')
        if '"samples": ' in text
        else text.replace('"method": "rtn"', '"method": "rtm"'),
    )
    with pytest.raises(
        PackError,
        match=r"q.safetensors: its header is not the one that was written: the file is damaged\. Download it",
    ):
        PackFile(copy)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_of_the_header_is_an_error_at_opening(copy, made, where, bit):
    copy.write_bytes(made.read_bytes())
    flip(copy, 8 * int(where * header_bytes(copy)) + bit)
    with pytest.raises(CheckpointError, match=r"q\.safetensors: "):
        PackFile(copy)


def test_a_changed_hash_of_a_tensor_is_an_error_at_opening(copy):
    with safe_open(copy, "pt") as f:
        entry = json.loads(f.metadata()["nibble_xxh3"])
    name = next(iter(entry["tensors"]))
    entry["tensors"][name] = f"{int(entry['tensors'][name], 16) ^ 1:016x}"
    rewritten(copy, nibble_xxh3=json.dumps(entry))
    with pytest.raises(PackError, match="q.safetensors: header entry 'nibble_xxh3': expected hashes, found"):
        PackFile(copy)


def test_an_entry_of_hashes_under_another_name_is_an_error(copy):
    with safe_open(copy, "pt") as f:
        text = f.metadata()["nibble_xxh3"]
    rewritten(copy, nibble_xxh3=None, nibble_xxh2=text)
    with pytest.raises(
        PackError,
        match="q.safetensors: header entry 'nibble_xxh2': expected the name 'nibble_xxh3': the file is "
        "damaged",
    ):
        PackFile(copy)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"description": 1, "tensors": {}}', '{"tensors": {}}', "[" * 100_000]
)
def test_hashes_that_are_none_are_named(copy, text):
    rewritten(copy, nibble_xxh3=text)
    with pytest.raises(PackError, match="q.safetensors: header entry 'nibble_xxh3': expected hashes, found"):
        PackFile(copy)


def test_files_of_earlier_versions_have_none(copy):
    rewritten(copy, nibble_xxh3=None)
    assert PackFile(copy).verify() == -1
    with pytest.raises(
        ValueError,
        match=r"q.safetensors: has no hashes to compare with: it was not written by Nibble 0\.7 or later",
    ):
        verified(copy)


@pytest.mark.quick
def test_verified_is_said(made):
    size = sum(t.nbytes for t in load_file(made).values())
    assert verified(made) == f"{made}: {size / 1e6:,.1f} MB in 1 files, every tensor as it was written"
    assert open_quantized(made).verify() == size


@pytest.mark.quick
@pytest.mark.parametrize("leaf", ["weight_scale", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_side_data_are_finite(copy, leaf, value):
    state, name = load_file(copy), "double_blocks.0.img_attn.qkv"
    state[f"{name}.{leaf}"].view(-1)[-1] = value
    with safe_open(copy, "pt") as f:
        metadata = {k: v for k, v in f.metadata().items() if k != "nibble_xxh3"}
    save_file(state, copy, metadata)
    file = PackFile(copy)
    file.sound_layer("double_blocks.0.img_attn.proj")
    with pytest.raises(
        CheckpointError, match=rf"q.safetensors: {name}.{leaf}: NaN or Inf\. The file is damaged"
    ):
        file.sound_layer(name)


def test_hashes_do_not_pass_on_as_origin(made, tmp_path):
    """A source's own hashes are of its tensors, not of ours."""
    save_tensors(tmp_path / "m.safetensors", load_file(tiny_flux.CHECKPOINT), {"about": "mine"})
    rtn = METHODS["rtn"]
    quantize_file(tmp_path / "m.safetensors", tmp_path / "q.safetensors", rtn, rtn.config)
    file = PackFile(tmp_path / "q.safetensors")
    assert dict(file.origin.metadata) == {"about": "mine"}
    assert file.verify() > 0
    with safe_open(tmp_path / "q.safetensors", "pt") as f:
        assert set(json.loads(f.metadata()["nibble_xxh3"])) == {"description", "hashes", "tensors"}
