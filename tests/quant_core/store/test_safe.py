"""Headers that are made to take memory, and tensors that cannot be read."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.store import safe
from comfyui_nibble.quant_core.store.safe import CheckpointError, open_safetensors

pytestmark = pytest.mark.quick


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_header_above_the_limit_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(safe, "LONGEST", 1000)
    monkeypatch.setattr(safe, "safe_open", None)
    path = write(tmp_path / "m.safetensors", {"__metadata__": {"a": "x" * 1000}})
    with pytest.raises(
        CheckpointError,
        match=r"m.safetensors: its header has 1027 bytes, expected at most 1000\. It is no model, or is "
        r"damaged",
    ):
        open_safetensors(path)


@pytest.mark.parametrize(
    "header",
    [
        {f"{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(250_000)},
        {"__metadata__": {f"k{i}": "" for i in range(500_000)}},
        {"a": {"dtype": "U8", "shape": [0] * 5_000_000, "data_offsets": [0, 0]}},
        {"__metadata__": {"nibble": json.dumps([[]] * 3_000_000)}},
    ],
    ids=["tensors", "entries", "a shape", "our entry"],
)
def test_a_header_that_would_take_much_memory_is_not_parsed(tmp_path, monkeypatch, header):
    monkeypatch.setattr(safe, "safe_open", None)
    path = write(tmp_path / "m.safetensors", header)
    with pytest.raises(
        CheckpointError,
        match=r"m.safetensors: its header of \d+ bytes would take \d+ MB to read, expected at most 180",
    ):
        open_safetensors(path)


def test_headers_of_large_models_are_read(tmp_path):
    """30,000 tensors, and 10 MB of text."""
    header = {
        f"blocks.{i}.attn.to_q.weight": {"dtype": "BF16", "shape": [1, 1], "data_offsets": [2 * i, 2 * i + 2]}
        for i in range(30_000)
    }
    header["__metadata__"] = {"workflow": "x" * 10_000_000}
    file = open_safetensors(write(tmp_path / "m.safetensors", header, bytes(60_000)))
    assert len(file.keys()) == 30_000


def test_a_length_beyond_the_end_is_a_file_that_is_not_whole(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(CheckpointError, match="m.safetensors: not a whole safetensors file of 10 bytes"):
        open_safetensors(tmp_path / "m.safetensors")


def test_a_tensor_that_is_not_there_names_the_file_and_the_tensor(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"m.safetensors: b: cannot be read \("):
        open_safetensors(tmp_path / "m.safetensors").get_tensor("b")


def test_a_dtype_that_pytorch_does_not_have_names_the_file_and_the_tensor(tmp_path):
    path = write(
        tmp_path / "m.safetensors",
        {"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}},
        bytes(3),
    )
    with pytest.raises(
        CheckpointError, match=r"m.safetensors: (a: cannot be read|not a whole safetensors file)"
    ):
        open_safetensors(path).get_tensor("a")
