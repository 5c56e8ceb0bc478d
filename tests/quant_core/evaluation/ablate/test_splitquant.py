from collections import Counter

import torch

from comfyui_nibble.quant_core.evaluation.ablate.splitquant import (
    BASELINES,
    FACTORS,
    PAPER,
    SLICES,
    WIDTHS,
    entries,
    factorial,
)
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.methods.factors import balanced, hadamard_factor, start_factor
from comfyui_nibble.quant_core.training.presets import PRESETS, UNTRAINED


def test_factorial_has_no_duplicates():
    found = factorial()
    assert len(found) == len(set(found)) == 2 * 2 * 2 + 4 * 3 * 3 * 2
    assert Counter(c[0] for c in found) == {1: 8, 2: 18, 4: 18, 8: 18, 16: 18}
    assert all(c[1] == "shared" and c[3] != "slice" for c in found if c[0] == 1)
    assert all(c[2] == "affine" for c in found if c[1] == "per slice")
    assert len(factorial(quick=True)) == 4 + 6
    assert all(c[0] in (1, 4) and c[3] == "token" for c in factorial(quick=True))


def test_what_is_left_out_is_the_same(tiny_state):
    """Every factor of every layer is a power of two, for which "orthogonal" starts as "hadamard"."""
    layers = FLUX.layers({k: tuple(v.shape) for k, v in tiny_state.items()})
    assert {p.stop - p.start for layer in layers if not layer.weight_only for p in layer.parts} == set(WIDTHS)
    assert WIDTHS[0] == tiny_flux.HIDDEN
    for size in {n for w in WIDTHS for k in SLICES for n in balanced(w // k)}:
        assert torch.equal(hadamard_factor(size), start_factor(size, 3))


def test_order_and_names():
    found = entries()
    names = [e.name for e in found]
    assert len(set(names)) == len(names) == 4 + 80 + 14
    assert names[:4] == list(BASELINES)
    four = [e for e in found if dict(e.levels).get("slices") == 4]
    assert found[4:22] == four
    assert all(e.pictures for e in found[:22])
    assert tuple(dict(found[4].levels).values()) == PAPER
    assert tuple(dict(found[4].levels)) == FACTORS
    assert [dict(e.levels)["slices"] for e in found[22:26]] == [1, 2, 8, 16]
    trained = found[26:40]
    assert all(e.preset != UNTRAINED and e.pictures and not e.levels for e in trained)
    assert all(e.preset == UNTRAINED for e in found if e not in trained)
    assert [e.name for e in trained[:2]] == ["splitquant, trained", "K=4 hadamard scales token, trained"]
    assert [e.method.name for e in trained] == ["splitquant"] + 13 * ["splitquant_4"]
    assert trained[0].preset == PRESETS["splitquant"]["standard"]
    assert trained[1].preset == PRESETS["splitquant_4"]["standard"]
    assert trained[-1].preset == PRESETS["splitquant_4"]["best"]
    blocks = [e.preset for e in trained if "in blocks" in e.name]
    assert (
        len({(p.blocks.coherence, p.blocks.isolate, p.blocks.adaptive) for p in blocks}) == len(blocks) == 8
    )
    assert all(p.distill is None for p in blocks)
    assert not any(e.preset != UNTRAINED for e in entries(quick=True))


def test_settings_are_those_of_the_name():
    for entry in entries():
        if entry.levels:
            levels, config = dict(entry.levels), entry.settings["config"]
            assert (config["slices"], config["per_slice"]) == (
                levels["slices"],
                levels["pairs"] == "per slice",
            )
            assert all(config[k] == levels[k] for k in ("transform", "scales", "clip"))
