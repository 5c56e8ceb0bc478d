"""A LinearSpec back from its text, in which torch.compile and operators hand it on."""

import json
from functools import lru_cache

from .spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec


@lru_cache(maxsize=4096)
def parse(text: str) -> LinearSpec:
    """The LinearSpec of a `LinearSpec.text`."""
    in_features, out_features, parts, bias, order, padding, spatial = json.loads(text)
    part = lambda start, stop, weight, act, smooth, rotation, rank, kronecker, per_slice, principal: PartSpec(
        start,
        stop,
        WeightSpec(*weight),
        ActivationSpec(*act) if act else None,
        smooth,
        rotation,
        rank,
        tuple(kronecker),
        per_slice,
        principal,
    )
    return LinearSpec(
        in_features, out_features, tuple(part(*values) for values in parts), bias, order, padding, spatial
    )
