"""Each family's map from diffusers' names, against diffusers' own class on the meta device."""

from collections import Counter

import pytest
import torch

from comfyui_nibble.quant_core.families import FAMILIES, by_name, detect
from comfyui_nibble.tests.assets.diffusers_models import MODELS, build

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    with torch.device("meta"):
        model = build(request.param)
    family, made, _, ours = MODELS[request.param]
    return by_name(family), made, ours, {k: tuple(v.shape) for k, v in model.state_dict().items()}


def test_every_tensor_is_mapped_once_to_comfyuis_shapes(case):
    family, made, ours, theirs = case
    assert detect(theirs) is detect(ours) is family
    assert family.diffusers_class == made
    mapped = family.diffusers(theirs)
    assert Counter(k for s in mapped.values() for k in s.keys) == Counter(theirs.keys())
    assert {k: (sum(theirs[o][0] for o in s.keys), *theirs[s.keys[0]][1:]) for k, s in mapped.items()} == ours
    # diffusers_model.place takes the rows of a packed layer as they are.
    assert not any(mapped[f"{layer.name}.weight"].swap_halves for layer in family.layers(ours))


def test_no_other_family_takes_it(case):
    """In either naming. Wan VACE is a Wan with more, so the order of FAMILIES decides there."""
    family, _, ours, theirs = case
    others = [f for f in FAMILIES if f is not family and (family.name, f.name) != ("wan_vace", "wan")]
    assert not any(f.matches(ours) or f.matches_diffusers(theirs) for f in others)
    assert not any(f.matches(theirs) for f in others)
