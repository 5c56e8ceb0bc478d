import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from comfyui_nibble.quant_core.families import Layer, Part
from comfyui_nibble.quant_core.layer.problem import Problem
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.training.reconstruct import (
    Run,
    TrainConfig,
    installed,
    judged,
    losses_of,
    train,
)
from comfyui_nibble.quant_core.training.segments import Chain
from comfyui_nibble.quant_core.training.student import Student

LAYERS = ("blocks.0.img", "blocks.0.txt", "blocks.1.all")
SAMPLES, STEPS = 3, 4
STREAM = {"blocks.0.img": 0, "blocks.0.txt": 1}.get


class Pair(torch.nn.Module):
    """Both outputs depend on both layers. Adds to its streams in place, to what a norm has kept for its
    gradient too, as ComfyUI's do."""

    def __init__(self):
        super().__init__()
        self.img, self.txt = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, img, txt):
        a, b = self.img(img), self.txt(txt)
        img += a.tanh() + b.mean(1, keepdim=True)
        img += 0.1 * torch.nn.functional.layer_norm(img, (64,))
        txt += b.tanh() + a.mean(1, keepdim=True)
        return img, txt


class Joint(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.all = torch.nn.Linear(64, 64)

    def forward(self, x):
        return x + self.all(x)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Pair(), Joint()])

    def forward(self, img, txt):
        return self.blocks[1](torch.cat(self.blocks[0](img, txt), 1)) / 2


class World:
    """A network on SAMPLES runs of STEPS calls, the last run held out, and its layers rounded to nearest."""

    def __init__(self):
        torch.manual_seed(0)
        self.network = Network().requires_grad_(False)
        inputs = [(torch.randn(1, 6, 64), torch.randn(1, 3, 64)) for _ in range(SAMPLES * STEPS)]
        self.evaluations = 0
        self.dies_at = None

        def call(i):
            self.evaluations += torch.is_grad_enabled()  # those of steps, not those that judge
            if self.evaluations == self.dies_at:
                raise SystemExit
            return self.network(*(t.clone() for t in inputs[i]))

        self.chain = Chain(self.network, ["blocks.0", "blocks.1"], call)
        self.modules = {name: [(self.network.get_submodule(name), slice(0, 64))] for name in LAYERS}
        self.calls = list(range((SAMPLES - 1) * STEPS))
        self.held = list(range(len(self.calls), SAMPLES * STEPS))

    def run(self, stop=1):
        everything = [*self.calls, *self.held]
        with torch.no_grad():
            targets = {c: self.chain.run(c, 0, stop, None) for c in everything}
        self.evaluations = 0
        return Run(
            0,
            stop,
            self.calls,
            self.held,
            {c: c // STEPS for c in everything},
            dict.fromkeys(everything, 1.0),
            None,
            targets,
        )

    def students(self, stop=1, kinds=("scale", "bias", "rounding")):
        """With biases that are off, so that there is something to learn."""
        off = torch.Generator().manual_seed(1)
        out = {}
        for name in LAYERS[: 2 if stop == 1 else 3]:
            module = self.modules[name][0][0]
            layer = Layer(name, name.rpartition(".")[0], 64, 64, (Part(0, 64),), name)
            problem = Problem(
                layer, module.weight.detach(), module.bias + 0.1 * torch.randn(64, generator=off), None
            )
            method = METHODS["rtn"]
            out[name] = Student(problem, method.fit(problem, method.config).layer, kinds)
        return out


@pytest.fixture
def world():
    return World()


def parameters(students):
    return [p.detach().clone() for s in students.values() for p in s.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


CONFIG = TrainConfig(("scale", "bias", "rounding"), steps=12, rate=1e-2, calls=3)


# -- the loss


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


# -- going on


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
