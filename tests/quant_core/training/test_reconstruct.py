from dataclasses import replace

import pytest
import torch

from comfyui_nibble.quant_core.calibration.segments import Chain
from comfyui_nibble.quant_core.training.reconstruct import (
    Run,
    TrainConfig,
    installed,
    judged,
    losses_of,
    train,
)
from comfyui_nibble.tests.quant_core.training.world import CONFIG, STEPS, STREAM, parameters, same


@pytest.mark.parametrize("coherence", [0.0, 4.0])
def test_loss_is_that_of_its_definition(world, coherence):
    run, students, calls = world.run(), world.students(), [0, 1, 3]
    run.weight |= {0: 2.0, 1: 0.5}
    with installed(students, world.modules):
        got = losses_of(world.chain, run, calls, coherence)
        outputs = [world.chain.run(c, 0, 1, None) for c in calls]
    for i in range(2):
        e = torch.stack(
            [run.weight[c] ** 0.5 * (o[i] - run.targets[c][i]) for c, o in zip(calls, outputs, strict=True)]
        )
        want = e.square().mean() + coherence * 3 * e.mean(0).square().mean()
        assert got[i].item() == pytest.approx(want.item(), rel=1e-5)
    assert not any("forward" in m.__dict__ for m in world.network.modules())


def test_coherent_errors_weigh_more(world):
    """The same error at each of n calls costs 1 + coherence n times its energy, one that turns its sign at
    each nothing more."""
    run = world.run()
    e = [0.1 * torch.randn_like(t) for t in run.targets[0]]
    for sign, factor in ((lambda c: 1, 1 + 4.0 * 4), (lambda c: (-1) ** c, 1)):
        shifted = {
            c: tuple(t + sign(c) * d for t, d in zip(run.targets[c], e, strict=True)) for c in run.targets
        }
        found = losses_of(world.chain, Run(**(vars(run) | {"targets": shifted})), [0, 1, 2, 3], 4.0)
        assert [float(f) for f in found] == pytest.approx(
            [factor * float(d.square().mean()) for d in e], rel=1e-4
        )


def test_judged_is_the_mean_over_held_out_runs(world):
    run, students = world.run(), world.students()
    run.held = [*world.calls[:4], *world.held]
    with torch.no_grad(), installed(students, world.modules):
        parts = [losses_of(world.chain, run, calls, 4.0) for calls in (run.held[:4], run.held[4:])]
    want = [float(a + b) / 2 for a, b in zip(*parts, strict=True)]
    assert judged(world.chain, run, students, world.modules, 4.0) == pytest.approx(want, rel=1e-6)
    assert judged(
        world.chain, run, {n: s.layer() for n, s in students.items()}, world.modules, 4.0
    ) == pytest.approx(want, rel=0.02)


# -- training


@pytest.mark.parametrize("stop", [1, 3])
def test_training_lowers_the_held_out_error(world, stop):
    run, students = world.run(stop), world.students(stop)
    before = sum(judged(world.chain, run, students, world.modules, 0.0))
    done = train(world.chain, run, students, world.modules, replace(CONFIG, rate=5e-2), STREAM)
    assert done.note == ""
    assert len(done.losses) == 12
    assert done.losses[0] == pytest.approx(1)
    after = sum(judged(world.chain, run, {n: s.layer() for n, s in students.items()}, world.modules, 0.0))
    assert after < 0.6 * before
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in world.network.modules())


def gradients(world, run, isolate):
    """{parameter: its gradient} of the first step."""
    students, found = world.students(), {}

    def on_step(step, loss):
        found.update(
            {
                f"{n}.{k}": p.grad
                for n, s in students.items()
                for k, p in s.named_parameters()
                if p.grad is not None
            }
        )
        return False

    train(
        world.chain,
        run,
        students,
        world.modules,
        TrainConfig(CONFIG.kinds, steps=1, isolate=isolate),
        STREAM,
        on_step=on_step,
    )
    return found


def test_a_stream_s_gradient_does_not_know_the_other_s_loss(world):
    run = world.run()
    other = {c: (img, txt + torch.randn(txt.shape)) for c, (img, txt) in run.targets.items()}
    plain, shifted = (
        gradients(world, Run(**(vars(run) | {"targets": t})), True) for t in (run.targets, other)
    )
    assert len(plain) == 6
    for name in plain:
        assert torch.equal(plain[name], shifted[name]) == name.startswith("blocks.0.img"), name
    mixed = [gradients(world, Run(**(vars(run) | {"targets": t})), False) for t in (run.targets, other)]
    for name in plain:
        assert not torch.equal(mixed[0][name], mixed[1][name])
        assert not torch.equal(mixed[0][name], plain[name])


def test_calls_of_a_step_are_of_one_sample_and_depend_on_seed_and_step_alone(world):
    def seen(seed, count=8):
        steps, run, students = [[]], world.run(), world.students()

        def call(i):
            if torch.is_grad_enabled():
                steps[-1].append(i)
            return world.chain.call(i)

        chain = Chain(world.network, ["blocks.0", "blocks.1"], call)
        config = TrainConfig(("bias",), steps=count, calls=3, seed=seed)
        train(chain, run, students, world.modules, config, on_step=lambda step, loss: steps.append([]))
        return steps[:-1]

    found = seen(0)
    assert found == seen(0)
    assert found[:5] == seen(0, count=5)
    assert found != seen(1)
    assert all(len(set(calls)) == 3 and len({c // STEPS for c in calls}) == 1 for calls in found)
    assert {c // STEPS for calls in found for c in calls} == {0, 1}  # and never the held-out sample


def test_divergence_ends_at_the_best_state(world):
    run, students = world.run(), world.students()
    start = parameters(students)
    done = train(
        world.chain, run, students, world.modules, TrainConfig(("scale",), steps=10, rate=1e3), STREAM
    )
    assert "times the first at step 1" in done.note or "loss nan" in done.note or "loss inf" in done.note
    assert same(parameters(students), start)
    assert len(done.losses) <= 2


def test_nan_ends_at_the_best_state(world):
    """The one of the least held-out loss, in units of where it began."""
    run, students = world.run(), world.students()
    ratio = lambda: [
        j / s for j, s in zip(judged(world.chain, run, students, world.modules, 4.0), start, strict=True)
    ]
    start = judged(world.chain, run, students, world.modules, 4.0)
    seen = []

    def on_step(step, loss):
        seen.append((sum(ratio()) / 2, parameters(students)))
        if step == 5:
            with torch.no_grad():
                students["blocks.0.img"].bias[3] = torch.nan
        return False

    done = train(world.chain, run, students, world.modules, CONFIG, STREAM, on_step=on_step)
    assert done.note == "loss nan at step 6"
    assert len(done.losses) == 6
    best = min(seen, key=lambda s: s[0])
    assert best[0] < 1
    assert same(parameters(students), best[1])


def test_layers_that_stand_in_several_modules(world):
    """A fused layer's rows are computed where diffusers keeps q, k and v apart."""
    student = world.students()["blocks.0.img"]
    layer = student.layer()
    halves = [torch.nn.Linear(64, 24), torch.nn.Linear(64, 40)]
    modules = {"x": [(halves[0], slice(0, 24)), (halves[1], slice(24, 64))]}
    x = torch.randn(5, 64)
    for found in (student, layer):
        with installed({"x": found}, modules), torch.no_grad():
            assert torch.equal(
                torch.cat([h(x) for h in halves], 1), torch.cat([found(x)[:, :24], found(x)[:, 24:]], 1)
            )
