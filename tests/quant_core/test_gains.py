import pytest
import torch

from comfyui_nibble.quant_core import gains


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
    assert gains.measure(run, modules, ratio=1e-2) == pytest.approx(found, rel=1e-3)  # linear: of any strength
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
