"""Whole models: what is trained, that stopped runs end the same, that what does not help is not taken."""

import json
from dataclasses import replace

import pytest
import torch

from comfyui_nibble.quant_core.calibration.file import Calibration, merge
from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.families.sdxl import SDXL
from comfyui_nibble.quant_core.layer.soundness import UnfitLayer
from comfyui_nibble.quant_core.methods import by_name
from comfyui_nibble.quant_core.run.layers import problem_of, quantize_layers
from comfyui_nibble.quant_core.run.stages import blocks_of, runs_of, steps_of
from comfyui_nibble.quant_core.training import reconstruct
from comfyui_nibble.quant_core.training import trainer as trainer_file
from comfyui_nibble.quant_core.training.plot import plot
from comfyui_nibble.quant_core.training.presets import UNTRAINED, Preset
from comfyui_nibble.quant_core.training.reconstruct import TrainConfig, installed
from comfyui_nibble.quant_core.training.trainer import (
    NoChain,
    NoTrajectory,
    require_chain,
    require_trajectory,
)
from comfyui_nibble.tests.assets.synthetic import flux_shapes

BLOCKS = ["double_blocks.0", "single_blocks.0", "single_blocks.1"]
TRAINED = Preset(TrainConfig(("transform", "smooth", "bias"), steps=3, rate=2e-3, calls=2), None)
BOTH = Preset(
    TrainConfig(("scale", "bias"), steps=2, rate=2e-3, calls=2),
    TrainConfig(("bias", "scale"), steps=3, rate=2e-3, calls=2),
    span=2,
)
FAST = {"smooth": ((0.5, 0.5),), "gptq": False}
ROBUQ = {
    "name": "robuq",
    "iterations": 0,
    "finalists": 1,
    "rank": 16,
    "activation_bits": 8,
    "clip": (1.0,),
    "low_rank": ("plain",),
    "smooth_statistics": ("absmax",),
    **FAST,
}


class Stopped(Exception):
    pass


def same_layers(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].spec == b[name].spec, name
        assert all(torch.equal(a[name].tensors[k], b[name].tensors[k]) for k in a[name].tensors), name


def without_seconds(rows):
    return [{k: v for k, v in row.to_json().items() if k != "seconds"} for row in rows]


def prediction_error(trainer, layers):
    """Energy of the error of the held-out predictions over theirs."""
    error = energy = 0.0
    for call in trainer.held:
        with torch.no_grad():
            want = trainer.chain.call(call)
            with installed(layers, trainer.modules):
                error += float((trainer.chain.call(call) - want).square().sum())
        energy += float(want.square().sum())
    return error / energy


@pytest.fixture(scope="module")
def untrained(small, tmp_path_factory):
    return small.quantize(tmp_path_factory.mktemp("untrained") / "s", UNTRAINED, **FAST)


def test_runs_of_blocks():
    assert runs_of(4, 4) == [(0, 5)]
    assert runs_of(7, 3) == [(0, 3), (3, 6), (6, 8)]
    assert runs_of(1, 4) == [(0, 2)]


def test_untrained_is_layer_by_layer(small, untrained):
    layers, rows, _ = untrained
    assert [name for name, _ in blocks_of(small.plan)] == BLOCKS
    method, source = by_name("splitquant_4"), small.checkpoint
    done = list(quantize_layers(small.plan, source, method, method.configured(**FAST), small.calibration))
    same_layers(layers, {layer.name: layer for layer, _ in done})
    assert without_seconds(rows) == without_seconds([row for _, row in done])


def stopped_and_gone_on(small, folder, preset, checks, at, **options):
    """The result of a run that was stopped at each of the `at` shares of all its checks."""
    stops = sorted(int(checks * share) for share in at)
    for stop in stops:
        seen = []

        def check(stop=stop, seen=seen):
            seen.append(1)
            if len(seen) == stop:
                raise Stopped

        with pytest.raises(Stopped):
            small.quantize(folder, preset, check=check, **options)
    return small.quantize(folder, preset, **options)


@pytest.mark.parametrize(
    ("preset", "options"), [(TRAINED, FAST), (BOTH, ROBUQ)], ids=["splitquant", "robuq, distilled"]
)
def test_stopped_run_goes_on_bit_for_bit(small, tmp_path, preset, options):
    count, yields = [], []
    whole = small.quantize(
        tmp_path / "whole", preset, check=lambda: count.append(1),
        progress=lambda items: yields.extend(items), **options
    )  # fmt: skip
    assert len(yields) == steps_of(small.plan, preset) == (5 if preset is BOTH else 3)
    # Stops further and further into what is left: a run that goes on has less to do.
    cut = stopped_and_gone_on(small, tmp_path / "cut", preset, len(count), (0.3, 0.45), **options)
    same_layers(cut[0], whole[0])
    assert without_seconds(cut[1]) == without_seconds(whole[1])
    logs = [json.loads(made[2].losses.read_text()) for made in (cut, whole)]
    assert logs[0] == logs[1]
    assert not list((tmp_path / "cut").glob("*.training*"))
    again = []
    small.quantize(tmp_path / "cut", preset, check=lambda: again.append(1), **options)
    assert again == []  # what is in the store is not done again


class Changed:
    """A checkpoint with one value of a tensor changed, which no fingerprint samples."""

    def __init__(self, checkpoint, key):
        self._checkpoint, self._key, self.shapes = checkpoint, key, checkpoint.shapes

    def get(self, key):
        tensor = self._checkpoint.get(key)
        if key == self._key:
            tensor = tensor.clone()
            tensor.view(-1)[1] += 1
        return tensor


@pytest.mark.parametrize("key", ["img_in.bias", "double_blocks.0.img_attn.qkv.weight"])
def test_no_training_goes_on_from_a_source_that_has_changed(small, tmp_path, key):
    """A block that was trained depends on all of the model, what stays in 16 bit included; so does the state
    of a training under way."""
    count, other = [], replace(small, checkpoint=Changed(small.checkpoint, key))
    want = other.quantize(tmp_path / "whole", TRAINED, check=lambda: count.append(1), **FAST)
    checks = len(count)
    folder, seen = tmp_path / "cut", []

    def check():
        seen.append(1)
        if len(seen) == checks // 2:
            raise Stopped

    with pytest.raises(Stopped):
        small.quantize(folder, TRAINED, check=check, **FAST)
    count.clear()
    got = other.quantize(folder, TRAINED, check=lambda: count.append(1), **FAST)
    assert len(count) == checks  # all of it again
    same_layers(got[0], want[0])


@pytest.mark.arithmetic
def test_training_is_told_and_taken_where_it_helps(small, untrained, tmp_path, monkeypatch):
    """The two-stream block gains for real: 0.48 to 0.55 dB, as sums are ordered. Those of the one-stream
    blocks, -0.02 to 0.06 dB, are within what that order moves, so the judge is told what to find there: one
    better, one worse; nor does the prediction's error follow from the first block alone."""
    real, found = trainer_file.Trainer._ratio, {"single_blocks.0": 10**0.02, "single_blocks.1": 10**-0.03}
    monkeypatch.setattr(
        trainer_file.Trainer,
        "_ratio",
        lambda self, run, *args: found.get(BLOCKS[run.first]) or real(self, run, *args),
    )
    preset = Preset(
        replace(TRAINED.blocks, steps=12, kinds=("transform", "smooth", "rounding", "bias")), None
    )
    layers, rows, trainer = small.quantize(tmp_path / "s", preset, **FAST)
    log = json.loads(trainer.losses.read_text())
    assert {name: entry["kept"] for name, entry in log.items()} == dict(
        zip(BLOCKS, (True, False, True), strict=True)
    )
    assert log["double_blocks.0"]["gain_db"] > 0.2
    assert (log["single_blocks.0"]["gain_db"], log["single_blocks.1"]["gain_db"]) == (-0.2, 0.3)
    told = {
        "double_blocks.0": f"trained {log['double_blocks.0']['gain_db']:+.1f} dB",
        "single_blocks.1": "trained +0.3 dB",
    }
    told["single_blocks.0"] = "kept its start (-0.2 dB trained)"
    for row in rows:
        weight_only = row.name.endswith(("mod.lin", "modulation.lin"))
        assert ("training" in row.choices) != weight_only
        if not weight_only:
            assert row.choices["training"].startswith(told[row.block])
        start = untrained[0][row.name]
        if weight_only or row.block == "single_blocks.0":
            same_layers({row.name: layers[row.name]}, {row.name: start})
        elif row.block == "double_blocks.0":  # the last block's best parameters may be those it began with
            assert not torch.equal(layers[row.name].tensors["transform"], start.tensors["transform"])
    plot(tmp_path / "losses.png", trainer.losses)
    assert (tmp_path / "losses.png").stat().st_size > 10_000


def test_diverging_training_keeps_the_start(small, untrained, tmp_path):
    preset = Preset(TrainConfig(("transform", "smooth"), steps=4, rate=1e6, calls=2, adaptive=False), None)
    layers, rows, trainer = small.quantize(tmp_path / "s", preset, **FAST)
    notes = [entry["note"] for entry in json.loads(trainer.losses.read_text()).values()]
    assert all("times the first at step" in note or note.startswith("loss ") for note in notes)
    told = {row.choices["training"] for row in rows if "training" in row.choices}
    assert all(any(note in text for note in notes) for text in told)
    for block, entry in json.loads(trainer.losses.read_text()).items():
        assert entry["gain_db"] > -0.05, block  # the parameters are back where they began
    assert prediction_error(trainer, layers) < 1.02 * prediction_error(trainer, untrained[0])
    same = lambda row: torch.equal(
        layers[row.name].tensors["weight"], untrained[0][row.name].tensors["weight"]
    )
    kept = [row for row in rows if row.choices.get("training", "").startswith("kept its start")]
    assert all(same(row) for row in kept)


@pytest.mark.parametrize("step", ["Student", "round_again"])
def test_a_layer_whose_linear_algebra_fails_is_named(small, tmp_path, monkeypatch, step):
    def fails(*args):
        raise torch.linalg.LinAlgError("linalg.inv: The diagonal element 3 is zero.")

    monkeypatch.setattr(trainer_file, step, fails)
    with pytest.raises(
        UnfitLayer,
        match=r"^layer double_blocks.0.\S+: cannot be fitted, The diagonal element 3 is zero; its weight "
        r"goes up to",
    ):
        small.quantize(tmp_path / "s", TRAINED, **FAST)


def test_training_that_ends_in_nan_is_the_worst(small, tmp_path, monkeypatch):
    trainer = small.trainer(tmp_path)
    trainer.begin(TrainConfig())
    monkeypatch.setattr(trainer_file, "judged", lambda *args: [1.0, float("nan")])
    assert trainer._ratio(None, {}, [1.0, 1.0]) == float("inf")


def at_odd_places(layer):
    """The layer with tensors at 8 bytes behind a multiple of 64, where memory-mapped files may have them."""

    def moved(tensor):
        raw = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
        start = -raw.data_ptr() % 64 + 8
        return raw[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    return replace(layer, tensors={k: moved(t) for k, t in layer.tensors.items()})


@pytest.mark.parametrize("skipped", [True, False])
def test_layers_of_files_are_computed_with_at_pytorchs_own_alignment(
    small, untrained, tmp_path, monkeypatch, skipped
):
    places, real = [], trainer_file.installed

    def installed(layers, modules):
        places.extend(
            t.data_ptr() % 64 for layer in layers.values() for t in getattr(layer, "tensors", {}).values()
        )
        return real(layers, modules)

    monkeypatch.setattr(trainer_file, "installed", installed)
    monkeypatch.setattr(reconstruct, "installed", installed)
    trainer = small.trainer(tmp_path)
    trainer.begin(TrainConfig(("bias",), steps=1, calls=1, adaptive=False))
    members = [layer for layer in small.plan if layer.block == BLOCKS[0]]
    layers = {layer.name: at_odd_places(untrained[0][layer.name]) for layer in members}
    assert {t.data_ptr() % 64 for layer in layers.values() for t in layer.tensors.values()} == {8}
    if skipped:
        trainer.skip(1, layers)
    else:
        problems = {m.name: problem_of(m, small.checkpoint, small.calibration, "cpu") for m in members}
        trainer.run(1, problems, layers, BLOCKS[0])
    assert places
    assert set(places) == {0}


def test_distilled_runs(small, tmp_path):
    start = small.quantize(tmp_path / "start", UNTRAINED, **ROBUQ)[0]
    preset = Preset(None, TrainConfig(("bias", "scale", "low_rank"), steps=12, rate=1e-2, calls=3), span=2)
    layers, rows, trainer = small.quantize(tmp_path / "s", preset, **ROBUQ)
    log = json.loads(trainer.losses.read_text())
    assert list(log) == [
        "distilled-double_blocks.0-to-single_blocks.0",
        "distilled-single_blocks.1-to-prediction",
    ]
    assert all(entry["kept"] and entry["gain_db"] > 0.03 for entry in log.values())
    assert layers.keys() == start.keys() == {layer.name for layer in small.plan}
    assert [row.name for row in rows] == [layer.name for layer in small.plan]
    assert {row.choices["distillation"] for row in rows if "distillation" in row.choices} == {
        f"trained {entry['gain_db']:+.1f} dB" for entry in log.values()
    }
    assert prediction_error(trainer, layers) < 0.95 * prediction_error(trainer, start)


@pytest.mark.parametrize("adaptive", [True, False])
def test_blocks_whose_error_is_amplified_learn_slower(small, tmp_path, monkeypatch, adaptive):
    rates, real = {}, trainer_file.train

    def train(chain, run, students, modules, config, *args):
        rates[BLOCKS[run.first]] = config.rate
        return real(chain, run, students, modules, config, *args)

    monkeypatch.setattr(trainer_file, "train", train)
    made = small.trainer

    def with_gains(*args):
        trainer = made(*args)
        assert set(trainer.gains) == (set(BLOCKS) if adaptive else set())  # measured where they are asked for
        trainer.gains = {"double_blocks.0": 1.0, "single_blocks.0": 4.0, "single_blocks.1": 100.0}
        return trainer

    monkeypatch.setattr(type(small), "trainer", lambda self, *args: with_gains(*args))
    preset = Preset(TrainConfig(("bias",), steps=1, rate=8e-3, calls=1, adaptive=adaptive), None)
    small.quantize(tmp_path / "s", preset, **FAST)
    assert rates == pytest.approx(
        dict.fromkeys(BLOCKS, 8e-3)
        if not adaptive
        else {"double_blocks.0": 8e-3, "single_blocks.0": 8e-3, "single_blocks.1": 2e-3}
    )


def test_timesteps_weigh_by_their_bins(small, tmp_path):
    trainer = small.trainer(tmp_path)
    trainer.begin(TrainConfig(bins=(3.0, 1.0)))
    steps = [c.step for c in trainer.recorded]
    assert set(steps) == {0, 1, 2}
    assert sum(trainer.weight.values()) / len(steps) == pytest.approx(1)
    by_step = {step: {trainer.weight[i] for i, s in enumerate(steps) if s == step} for step in (0, 1, 2)}
    assert all(len(w) == 1 for w in by_step.values())
    early, middle, late = (by_step[i].pop() for i in range(3))
    assert early == middle == pytest.approx(3 * late)  # timesteps 1, 0.7 and 0.3
    trainer.begin(TrainConfig())
    assert set(trainer.weight.values()) == {1.0}


def test_held_out_samples_are_not_trained_on(small, tmp_path):
    trainer = small.trainer(tmp_path)
    assert {trainer.sample[i] for i in trainer.calls} == {0, 1}
    assert {trainer.sample[i] for i in trainer.held} == {2}


def test_calibrations_without_recorded_calls_are_refused(small, tmp_path):
    with pytest.raises(NoTrajectory, match="training needs a calibration, found none"):
        require_trajectory(None)
    merge([small.calibration.path, small.calibration.path], tmp_path / "merged")
    with pytest.raises(
        NoTrajectory,
        match=r"merged: holds no recorded inputs of the network to train on.*Calibrate again, or set",
    ):
        require_trajectory(Calibration(tmp_path / "merged"))
    require_trajectory(small.calibration)


def test_families_whose_blocks_are_no_chain_are_refused():
    with pytest.raises(
        NoChain, match=r"those of SDXL also read what other blocks computed. Set training to none"
    ):
        require_chain(SDXL, [])
    plan = FLUX.layers(flux_shapes(hidden=128))
    require_chain(FLUX, plan)
    with pytest.raises(NoChain, match="FLUX.1"):  # blocks that a variant adds
        require_chain(FLUX, [*plan, replace(plan[0], block="injector.0")])
