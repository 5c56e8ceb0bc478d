"""A training that is stopped goes on from its last checkpoint, which is trusted only where it is sound."""

import json
import pickle
from dataclasses import replace

import pytest
from safetensors import safe_open

from comfyui_nibble.quant_core.training.reconstruct import (
    train,
)
from comfyui_nibble.tests.quant_core.training.world import CONFIG, STREAM, parameters, same


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 6, 11])
def test_interrupted_run_goes_on_bit_for_bit(world, tmp_path, at):
    run, whole, checkpoint = world.run(), world.students(), tmp_path / "run.training"
    want = train(world.chain, run, whole, world.modules, CONFIG, STREAM)

    def on_step(step, loss):
        if step == at:
            raise Stopped
        return False

    with pytest.raises(Stopped):
        train(world.chain, run, world.students(), world.modules, CONFIG, STREAM, checkpoint, on_step)
    assert not any("forward" in m.__dict__ for m in world.network.modules())
    world.evaluations, students = 0, world.students()
    got = train(world.chain, run, students, world.modules, CONFIG, STREAM, checkpoint)
    assert world.evaluations == (12 - at - 1) * CONFIG.calls
    assert got.losses == want.losses
    assert same(parameters(students), parameters(whole))


def test_killed_run_goes_on_from_its_last_checkpoint(world, tmp_path):
    """Killed within step 8, with checkpoints after each third step."""
    run, whole, checkpoint = world.run(), world.students(), tmp_path / "run.training"
    want = train(world.chain, run, whole, world.modules, CONFIG, STREAM)
    world.evaluations, world.dies_at = 0, 8 * CONFIG.calls + 2
    with pytest.raises(SystemExit):
        train(
            world.chain,
            run,
            world.students(),
            world.modules,
            CONFIG,
            STREAM,
            checkpoint,
            lambda step, loss: step % 3 == 2,
        )
    world.evaluations, world.dies_at, students = 0, None, world.students()
    got = train(world.chain, run, students, world.modules, CONFIG, STREAM, checkpoint)
    assert world.evaluations == (12 - 6) * CONFIG.calls
    assert got.losses == want.losses
    assert same(parameters(students), parameters(whole))


def stopped(world, checkpoint, at=6):
    def on_step(step, loss):
        if step == at:
            raise Stopped
        return False

    with pytest.raises(Stopped):
        train(world.chain, world.run(), world.students(), world.modules, CONFIG, STREAM, checkpoint, on_step)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole.replace(b'"parameters.0"', b'"parameters.x"'),
        lambda whole: whole.replace(b'\\"schedule\\": {', b'\\"schedules\\":{'),
        lambda whole: pickle.dumps({"parameters": []}),
        lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
    ],
    ids=["empty", "cut", "without a parameter", "without the schedule", "pickled", "one bit"],
)
def test_a_damaged_checkpoint_is_not_trusted(world, tmp_path, damage):
    """The run starts again and ends as one that was never stopped."""
    checkpoint = tmp_path / "run.training"
    stopped(world, checkpoint)
    whole = checkpoint.read_bytes()
    assert damage(whole) != whole
    checkpoint.write_bytes(damage(whole))
    world.evaluations, students, fresh = 0, world.students(), world.students()
    got = train(world.chain, world.run(), students, world.modules, CONFIG, STREAM, checkpoint)
    assert world.evaluations == 12 * CONFIG.calls
    want = train(world.chain, world.run(), fresh, world.modules, CONFIG, STREAM)
    assert got.losses == want.losses
    assert same(parameters(students), parameters(fresh))


def test_a_checkpoint_of_other_students_is_not_trusted(world, tmp_path):
    checkpoint = tmp_path / "run.training"
    stopped(world, checkpoint)
    fewer = dict(list(world.students().items())[:1])
    world.evaluations = 0
    train(world.chain, world.run(), fewer, world.modules, replace(CONFIG, isolate=False), STREAM, checkpoint)
    assert world.evaluations == 12 * CONFIG.calls


def test_a_checkpoint_is_a_safetensors_file(world, tmp_path):
    stopped(world, tmp_path / "run.training")
    with safe_open(tmp_path / "run.training", "pt") as f:
        plain, keys = json.loads(f.metadata()["nibble_training"]), set(f.keys())
    assert len(plain["losses"]) == 7
    assert plain["schedule"]["last_epoch"] == 7
    assert {
        "parameters.0",
        "good.0",
        "optimizer.0.step",
        "optimizer.0.exp_avg",
        "optimizer.0.exp_avg_sq",
    } <= keys
