"""`nibble calibrate` samples once and runs the blocks of diffusers' models again: the statistics are those of
sampling again for each pass, to the last bit on a CPU."""

from collections import Counter

import pytest
import torch

from comfyui_nibble.quant_core.calibration.plan import inputs_of
from comfyui_nibble.quant_core.diffusers_host import pipeline
from comfyui_nibble.quant_core.families import FLUX, PIXART
from comfyui_nibble.quant_core.layer.statistics import InputStatistics
from comfyui_nibble.tests.assets.pipelines import PROMPTS, flux, pixart

SAMPLES, STEPS, SIZE = 4, 2, 64


def deeper(state):
    """With guidance in one batch, whose text is cut to its longest prompt, and more blocks to run again."""
    return pixart(state, layers=4)


def computed(model):
    """{block: how often its first linear layer was called}."""
    found = Counter()
    for name, block in model.named_modules():
        if name.count(".") == 1 and "blocks" in name:
            linear = next(m for m in block.modules() if isinstance(m, torch.nn.Linear))
            linear.register_forward_pre_hook(lambda m, args, _name=name: found.update([_name]))
    return found


@pytest.mark.parametrize(("build", "family"), [(flux, FLUX), (deeper, PIXART)], ids=["flux", "pixart"])
def test_the_statistics_are_those_of_passes(build, family, tiny_state, tmp_path, monkeypatch, caplog):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = build(tiny_state)
    pipe.set_progress_bar_config(disable=True)
    for part in (m for m in pipe.components.values() if isinstance(m, torch.nn.Module)):
        part.eval()  # as loaded ones are; T5 would drop out values
    state = {k: tuple(v.shape) for k, v in pipe.transformer.state_dict().items()}
    shapes = {
        k: (sum(state[o][0] for o in s.keys), *state[s.keys[0]][1:])
        for k, s in family.diffusers(state).items()
    }
    sizes = Counter()
    for i in inputs_of(family.mapped(shapes)):
        sizes[i.block] += InputStatistics.nbytes(i.width, i.blocks)
    asked = {"samples": SAMPLES, "steps": STEPS, "size": SIZE, "seed": 0, "memory": max(sizes.values())}
    found, said = computed(pipe.transformer), []
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "is_chain", lambda *args: False)
        want = pipeline.calibrate_with(pipe, tmp_path / "want", PROMPTS, **asked, say=said.append)
    passes = want.meta["passes"]
    assert passes > 1
    evaluations = SAMPLES * STEPS
    assert set(found.values()) == {passes * evaluations}
    found.clear()
    got = pipeline.calibrate_with(pipe, tmp_path / "got", PROMPTS, **asked, say=said.append)
    assert sum(found.values()) < 2 * len(sizes) * evaluations
    assert max(found.values()) == 2 * evaluations
    worth = sum(found.values()) / len(sizes) / evaluations
    assert f"{worth:.2f} samplings' worth of work in place of {got.meta['passes']}" in said[-1]
    assert "cannot be run again" not in caplog.text
    for name in want.names:
        a, b = want.get(name), got.get(name)
        assert a.count == b.count
        leaves = ("absmax", "tokens", "keys", "timesteps")
        assert all(torch.equal(getattr(a, leaf), getattr(b, leaf)) for leaf in leaves), name
        assert all(torch.equal(a.hessians[k], b.hessians[k]) for k in a.hessians), name
