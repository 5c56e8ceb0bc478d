"""A network small enough to train in a test, on runs of recorded calls."""

import torch

from comfyui_nibble.quant_core.calibration.segments import Chain
from comfyui_nibble.quant_core.families import Layer, Part
from comfyui_nibble.quant_core.layer.problem import Problem
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.training.reconstruct import (
    Run,
    TrainConfig,
)
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


def parameters(students):
    return [p.detach().clone() for s in students.values() for p in s.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


CONFIG = TrainConfig(("scale", "bias", "rounding"), steps=12, rate=1e-2, calls=3)
