import json

import pytest
import torch
from typer.testing import CliRunner

from comfyui_nibble.quant_core.calibration import Calibration, CalibrationError, gains
from comfyui_nibble.quant_core.calibration import file as calibration_file
from comfyui_nibble.quant_core.calibration.trajectory import Call, Trajectory
from comfyui_nibble.quant_core.cli import allocate
from comfyui_nibble.quant_core.cli.commands import app
from comfyui_nibble.quant_core.diffusers_host import model as diffusers_model
from comfyui_nibble.quant_core.evaluation.demo import run, tiny_flux
from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.tests.support import relative_error


class Sum(torch.nn.Module):
    """3 a(x) + b(x) + 0 c(x)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(64, 64, bias=False) for _ in range(3))
        with torch.no_grad():
            self.b.weight.mul_(2)

    def forward(self, x):
        return 3 * self.a(x) + self.b(x) + 0 * self.c(x)


@torch.no_grad()
def test_gain_is_the_energy_that_arrives():
    torch.manual_seed(0)
    model, x = Sum(), torch.randn(512, 64)
    run = lambda: model(x)
    modules = {"a": [model.a], "b": [model.b], "c": [model.c], "both": [model.a, model.b]}
    found = gains.measure(run, modules)
    power = {k: float(w * getattr(model, k)(x).square().sum()) for k, w in (("a", 9), ("b", 1))}
    assert found["c"] == 0
    assert found["a"] / found["b"] == pytest.approx(power["a"] / power["b"], rel=0.05)
    assert found["both"] / found["a"] == pytest.approx(1 + power["b"] / power["a"], rel=0.05)
    assert sum(found.values()) / 4 == pytest.approx(1)
    assert gains.measure(run, modules, ratio=1e-2) == pytest.approx(
        found, rel=1e-3
    )  # linear: of any strength
    assert not model.a._forward_hooks


def test_hooks_are_gone_after_an_error():
    model = Sum()
    calls = []

    def dies():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return model(torch.ones(1, 64))

    with pytest.raises(KeyboardInterrupt):
        gains.measure(dies, {"a": [model.a]})
    assert not model.a._forward_hooks


# -- recorded calls


def trajectory(samples, steps):
    calls = [Call(i, step, 1 - step / steps, False, 0.0, {}) for i in range(samples) for step in range(steps)]
    return Trajectory(calls, None)


def test_chains_are_spread_over_the_steps():
    assert gains.chains(trajectory(4, 9), 2, 5) == [[0, 2, 4, 6, 8], [9, 11, 13, 15, 17]]
    assert gains.chains(trajectory(1, 1), 2, 5) == [[0]]
    some = trajectory(2, 6)
    del some.calls[1:4]  # the second sample has more calls left
    assert gains.chains(some, 1, 3) == [[3, 5, 8]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The shipped model as a diffusers `transformer` folder."""
    path = tmp_path_factory.mktemp("model") / "transformer"
    tiny_flux.load().save_pretrained(path)
    return path


@pytest.fixture
def calibration(calibrated, tmp_path):
    """The same calibration with nothing measured beside it."""
    (tmp_path / "c").symlink_to(calibrated)
    return Calibration(tmp_path / "c")


@pytest.fixture(scope="module")
def calibrated(folder, tmp_path_factory):
    checkpoint = Checkpoint(folder)
    layers = FLUX.layers(checkpoint.shapes)
    out = tmp_path_factory.mktemp("calibration") / "c"
    return run.calibrate_tiny(
        tiny_flux.load(), layers, out, steps=4, samples=3, model_hash=checkpoint.fingerprint()
    ).path


def test_gains_of_a_calibration(folder, calibration):
    found = allocate.measured_gains(folder, calibration, samples=2)
    assert len(found) == 12  # and none of the four modulations
    assert sum(found.values()) / 12 == pytest.approx(1)


@torch.no_grad()
def test_replay_is_the_sampling(calibration):
    """Euler's steps are found from the recorded states: the change that noise makes is that of sampling again
    with the noise."""
    model, t = tiny_flux.load(), calibration.trajectory()
    (chain,) = gains.chains(t, 1, 4)
    assert [t.calls[i].step for i in chain] == [0, 1, 2, 3]
    run_again = gains.replayed(model, t, [chain])
    assert run_again().abs().max() < 1e-4  # nothing has changed: no noise, no change

    def sample():
        args, kwargs = t.arguments(chain[0])
        x = kwargs["hidden_states"]
        for i in chain:
            kwargs = t.arguments(i)[1] | {"hidden_states": x}
            x = x - 0.25 * model(*args, **kwargs)[0]
        return x.flatten()

    want = sample()
    for target in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_out"):
        with gains._noisy([model.get_submodule(target)], 1e-3, 3):
            moved = sample() - want
        with gains._noisy([model.get_submodule(target)], 1e-3, 3):
            found = run_again()
        assert relative_error(moved, found) < 0.01, target


def test_stopped_measurement_goes_on_and_a_second_is_free(folder, calibration, tmp_path, monkeypatch):
    measured = allocate.measured_gains(folder, calibration, samples=1)
    path = tmp_path / "c.gains.json"
    whole = path.read_text()
    path.unlink()
    seen = []

    def dies(items, total):
        for item in items:
            if len(seen) == 4:
                raise KeyboardInterrupt
            seen.append(item)
            yield item

    with pytest.raises(KeyboardInterrupt):
        allocate.measured_gains(folder, calibration, progress=dies, samples=1)
    assert len(json.loads(path.read_text())["layers"]) == 5  # the fifth was measured already
    left = []
    allocate.measured_gains(
        folder, calibration, progress=lambda items, total: left.append(total) or items, samples=1
    )
    assert left == [7]
    assert path.read_text() == whole
    monkeypatch.setattr(diffusers_model, "full", None)
    assert allocate.measured_gains(folder, calibration, samples=1) == measured
    with pytest.raises(TypeError, match="not callable"):  # another number of samples is another measurement
        allocate.measured_gains(folder, calibration, samples=2)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"c.gains.json: not a table of gains .*Delete it to measure again"):
        allocate.measured_gains(folder, calibration, samples=1)


@pytest.mark.parametrize("energy", [float("nan"), float("inf"), -1.0])
def test_gains_that_are_no_numbers_are_named(calibration, tmp_path, monkeypatch, energy):
    """Measured on a model with NaN, or read from a damaged table."""
    linear = torch.nn.Linear(2, 2)
    monkeypatch.setattr(gains, "_require_fit", lambda *args: None)
    monkeypatch.setattr(gains, "replayed", lambda *args: lambda: None)
    monkeypatch.setattr(gains, "_energy", lambda *args: energy)
    asked = calibration, ["a"], lambda: (linear, {"a": [linear]})
    named = r"calibration .*: gain of layer a: expected a finite energy, found (nan|inf|-1\.0)"
    with pytest.raises(CalibrationError, match=named):
        gains.of_calibration(*asked)
    monkeypatch.setattr(gains, "_energy", lambda *args: 0.0)
    with pytest.raises(CalibrationError, match="no layer's noise arrives"):
        gains.of_calibration(*asked)
    [table] = [path for path in gains.tables_of(calibration) if path.exists()]
    found = json.loads(table.read_text())
    found["layers"][0]["energy"] = energy
    table.write_text(json.dumps(found))
    with pytest.raises(CalibrationError, match=named):
        gains.of_calibration(*asked)
    table.unlink()


def test_commands_write_and_use_them(folder, calibration, tmp_path, monkeypatch):
    out = tmp_path / "gains.json"
    result = CliRunner().invoke(
        app, ["gains", str(folder), str(calibration.path), str(out), "--samples", "1", "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found == allocate.measured_gains(folder, calibration, samples=1)
    assert result.stdout.split()[1] == max(found, key=found.get)
    given = []
    monkeypatch.setattr(allocate, "allocate_file", lambda *args: given.append(args[5]) or 1 / 0)
    for gain in ("auto", str(out)):
        CliRunner().invoke(
            app,
            [
                "allocate",
                str(folder),
                "q",
                "--calibration",
                str(calibration.path),
                "--budget",
                "A3",
                "--gains",
                gain,
            ],
        )
    assert given == [allocate.measured_gains(folder, calibration), found]


def test_calibrations_that_cannot_be_used(folder, calibration, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"tiny_flux.safetensors: expected a diffusers `transformer` folder, found no config.json",
    ):
        allocate.measured_gains(tiny_flux.CHECKPOINT, calibration)
    other = torch.nn.Linear(2, 2)
    with pytest.raises(
        CalibrationError, match=r"its recorded inputs do not fit Linear \(missing a required argument"
    ):
        gains.of_calibration(calibration, ["a"], lambda: (other, {"a": [other]}))
    calibration_file.merge([calibration.path, calibration.path], tmp_path / "merged.safetensors")
    with pytest.raises(CalibrationError, match="merged.safetensors: holds no recorded inputs of the network"):
        allocate.measured_gains(folder, Calibration(tmp_path / "merged.safetensors"))
