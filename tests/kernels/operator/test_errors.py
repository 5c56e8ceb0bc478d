from pathlib import Path

import pytest

from comfyui_nibble.kernels.operator.errors import (
    MESSAGE,
    NAME,
    NamedError,
    naming,
    plain,
    sentence,
    shortened,
)
from comfyui_nibble.kernels.operator.spec import SpecError
from comfyui_nibble.quant_core.store.safe import CheckpointError

pytestmark = pytest.mark.quick


def test_a_text_without_control_characters_stays_as_it_is():
    text = "/models/flux ü 漢字.safetensors: double_blocks.0: expected F32 [4, 4], found BF16 [4, 4]."
    assert str(CheckpointError(text)) == text


def test_control_characters_marks_of_direction_and_half_surrogates_are_escaped():
    assert plain("a\x1b[2Jb\r\n\u202e\ud800\0") == r"a\x1b[2Jb\r\n\u202e\ud800\x00"
    assert plain("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert str(CheckpointError("m: \x07")) == r"m: \x07"


def test_a_long_name_is_cut_in_its_middle():
    name = "a" * 500 + "." + "z" * 500
    cut = sentence(f"m: {name} missing").removeprefix("m: ").removesuffix(" missing")
    assert (len(cut), cut[:100], cut[-60:]) == (NAME, "a" * 100, "z" * 60)


def test_the_path_in_front_is_not_cut():
    path = "/folder" * 100 + "/m.safetensors"
    assert sentence(f"{path}: {'x' * 300}").startswith(f"{path}: xx")


def test_a_text_has_2000_characters_at_most_and_keeps_its_end():
    text = sentence("m: " + "word " * 10_000 + "end")
    assert len(text) == MESSAGE
    assert text.startswith("m: word")
    assert text.endswith("word end")
    assert shortened("x" * NAME) == "x" * NAME


def test_what_is_found_wrong_within_a_file_names_it():
    with pytest.raises(SpecError, match=r"^m.safetensors: layer a: no$"), naming(Path("m.safetensors")):
        raise SpecError("layer a: no")
    with pytest.raises(CheckpointError, match=r"^m.safetensors: no$"), naming(Path("m.safetensors")):
        raise CheckpointError("m.safetensors: no")
    with pytest.raises(NamedError, match=r"^m.safetensors: of others$"), naming(Path("m.safetensors")):
        raise ValueError("of others")
    with pytest.raises(SpecError, match=r"^of another file$"), naming(Path("m.safetensors"), SpecError):
        raise SpecError("of another file")
