import json

import pytest

from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, SpecError, WeightSpec
from comfyui_nibble.quant_core.formats.spec_json import from_json, to_json

pytestmark = pytest.mark.quick


def two_parts():
    return LinearSpec(
        320,
        64,
        (
            PartSpec(0, 64, smooth=True, rank=16),
            PartSpec(64, 320, activation=ActivationSpec(unsigned=True, shift=0.171875), smooth=True, rank=16),
        ),
    )


def test_json_round_trip():
    spec = two_parts()
    assert from_json(json.loads(json.dumps(to_json(spec)))) == spec


def test_shapes_of_two_parts():
    assert two_parts().shapes() == {
        "weight": (64, 160),
        "weight_scale": (5, 64),
        "smooth_factor": (320,),
        "proj_down": (320, 16),
        "proj_up": (64, 32),
        "bias": (64,),
    }


def test_channel_scales_and_two_bit_codes():
    spec = LinearSpec(256, 8, (PartSpec(0, 256, WeightSpec(bits=2, granularity="channel")),), bias=False)
    assert spec.shapes() == {"weight": (8, 64), "weight_scale": (1, 8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("bias"), "expected the fields"),
        (lambda d: d["parts"][0].update(extra=1), "expected the fields"),
        (lambda d: d["parts"][0].update(rank="16"), "expected int"),
        (lambda d: d["parts"][0].update(smooth=1), "expected bool"),
        (lambda d: d["parts"][1].update(start=128), "parts must follow each other"),
        (lambda d: d["parts"][0]["weight"].update(bits=5), "weight bits"),
        (
            lambda d: d["parts"][0]["activation"].update(bits=5),
            "activation bits must be 1, 2, 3, 4 or 8, found 5",
        ),
        (lambda d: d["parts"][1]["activation"].update(bits=1), "cannot be unsigned"),
        (lambda d: d["parts"][1].update(rotation=64), "shift cannot be combined"),
        (lambda d: d.update(in_features=321), "parts end at channel 320"),
        (lambda d: d.update(parts=7), "parts must be a list"),
    ],
)
def test_contradictions_are_named(change, message):
    data = json.loads(json.dumps(to_json(two_parts())))
    change(data)
    with pytest.raises(SpecError, match=message):
        from_json(data)


def test_group_must_divide_the_part():
    with pytest.raises(SpecError, match="group 64 does not divide 100"):
        PartSpec(0, 100)
