import pytest
import torch

from comfyui_nibble.quant_core.formats import origin
from comfyui_nibble.quant_core.formats.origin import Origin, decoded, encoded, is_beside, outside
from comfyui_nibble.quant_core.store.safe import CheckpointError

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "value",
    [
        (1, (2,), []),
        {"a": (1, 2), "b": {"tuple": [1]}},
        {3: "x", "y": None},
        torch.float16,
        [float("-inf"), 0.5, True],
        {"dtype": "float32"},
    ],
)
def test_configs_come_back_as_they_were(value):
    assert decoded(encoded(value)) == value
    assert type(decoded(encoded(value))) is type(value)


def test_what_has_no_form_in_a_file():
    with pytest.raises(TypeError, match="Linear.*has no form in a file"):
        encoded({"a": [torch.nn.Linear(1, 1)]})


def test_header_entries_are_kept_small_ones_first_and_without_those_of_formats():
    big = "x" * origin.METADATA_BYTES
    found = Origin.of_header(
        {"workflow": big, "config": "{}", "format": "pt", "nibble": "{}", "modelspec.title": "t"}
    )
    assert found.metadata == {"config": "{}", "modelspec.title": "t"}
    assert len(found.dropped) == 1
    assert "'workflow' (1048576 characters) is not kept" in found.dropped[0]


def test_tensors_outside_of_the_network():
    sizes = {
        "v_pred": 0, "cc_projection.weight": 5_000_000, "first_stage_model.decoder.conv_in.weight": 9, "cond_stage_model.x": 9,
        "conditioner.embedders.0.x": 9, "conditioner.conditioners.seconds_start.embedder.weight": 100, "text_encoders.t5.weight": 9,
        "vae.x": 9, "unknown": 4, "huge": origin.BESIDE_BYTES,
    }  # fmt: skip
    kept, dropped = outside(sizes)
    assert sorted(kept) == [
        "cc_projection.weight",
        "conditioner.conditioners.seconds_start.embedder.weight",
        "unknown",
        "v_pred",
    ]
    assert dropped == ("1 tensors outside of the diffusion model are not kept: huge",)
    assert [k for k in sizes if is_beside(k)] == [
        "v_pred",
        "cc_projection.weight",
        "conditioner.conditioners.seconds_start.embedder.weight",
    ]


def test_a_record_that_we_did_not_write():
    for value in ([], {"x": 1}, {"beside": [1]}, {"host": []}, {"host": {"a": {"dict": [1]}}}):
        with pytest.raises(CheckpointError, match="'origin'"):
            Origin.from_json(value, {}.get)
