from dataclasses import replace

import pytest

from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.training.presets import NAMES, PRESETS, UNTRAINED, preset
from comfyui_nibble.quant_core.training.student import KINDS

pytestmark = pytest.mark.quick


def test_every_name_of_every_method():
    for method in METHODS:
        assert preset(method, "none") == UNTRAINED
    for method, found in PRESETS.items():
        assert method in METHODS
        assert {"none", *found} == set(NAMES)
        for name in found:
            made = preset(method, name)
            assert made != UNTRAINED
            assert made.blocks or made.distill
            for config in filter(None, (made.blocks, made.distill)):
                assert set(config.kinds) <= set(KINDS)
                assert replace(config, steps=1) != config


def test_errors_say_what_to_choose():
    with pytest.raises(ValueError, match=r"unknown training 'long'. Choose of: none, standard, best\."):
        preset("splitquant", "long")
    with pytest.raises(
        ValueError,
        match="method svdquant has no training; splitquant, splitquant_4, robuq have. Set training to none",
    ):
        preset("svdquant", "best")
