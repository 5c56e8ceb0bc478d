"""While a step runs the host waits for nothing of the device; its numbers are read once, at its end."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_nibble.quant_core.calibration import calibrate
from comfyui_nibble.quant_core.calibration.capture import Capture
from comfyui_nibble.quant_core.calibration.plan import Input
from comfyui_nibble.quant_core.layer.statistics import TOKENS, NonFiniteActivation

NAMES = [f"layer.{i}" for i in range(5)]
INPUTS = [Input(name, 64, ((0, 64),), name) for name in NAMES]
SAMPLES, STEPS = 5, 3


class Waits(TorchDispatchMode):
    """Counts what would wait for a device that held all values of 16 and 32 bits: keys, in 64 bits, never
    leave the CPU."""

    def __init__(self):
        super().__init__()
        self.found, self.stacks = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        self.stacks += name == "stack"
        first = next((a for a in args if isinstance(a, torch.Tensor)), None)
        on_device = first is not None and first.is_floating_point() and first.dtype != torch.float64
        reads = name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        copies = name == "_to_copy" and kwargs.get("device") == torch.device("cpu")
        if on_device and (reads or (copies and not kwargs.get("non_blocking"))):
            self.found.append(name)
        return function(*args, **kwargs)


@pytest.fixture
def modules():
    return {name: torch.nn.Linear(64, 64, dtype=torch.bfloat16) for name in NAMES}


def sampling(modules, rows, spoil=lambda sample, step, x: x):
    def run(sample, capture):
        for step in range(STEPS):
            capture.at(step, 1 - step / STEPS)
            x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(10 * sample + step)).bfloat16()
            for module in modules.values():
                module(spoil(sample, step, x) if module is modules["layer.2"] else x)

    return run


@torch.no_grad()
@pytest.mark.parametrize("rows", [2000, TOKENS + 100])
def test_one_look_a_step(modules, tmp_path, monkeypatch, rows):
    waits, looks, settle = Waits(), [], Capture.settle

    def counted(capture):
        looks.append(len(capture._peaks))
        settle(capture)

    monkeypatch.setattr(Capture, "settle", counted)
    run = sampling(modules, rows)

    def watched(sample, capture):
        with waits:
            run(sample, capture)

    calibrate(watched, modules, INPUTS, tmp_path, {"model": "m"}, samples=SAMPLES, memory=2**30)
    assert not waits.found
    assert [n for n in looks if n] == [len(NAMES)] * SAMPLES * STEPS
    # One tensor a step is looked at; that of each sampling's last step once its run is over.
    assert waits.stacks == SAMPLES * (STEPS - 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize(("sample", "step"), [(1, 0), (3, 1), (4, 2)], ids=["fit", "held out", "last"])
def test_the_place_is_named_at_the_end_of_the_step(modules, tmp_path, value, sample, step):
    def spoil(at, when, x):
        if (at, when) != (sample, step):
            return x
        x = x.clone()
        x[5, 17] = value
        return x

    place = rf"at the input of layer layer\.2, channel 17, sample {sample}, step {step}\."
    with pytest.raises(NonFiniteActivation, match=place):
        calibrate(
            sampling(modules, 8, spoil),
            modules,
            INPUTS,
            tmp_path,
            {"model": "m"},
            samples=SAMPLES,
            memory=2**30,
        )


def test_tokens_that_change_in_place_after_a_call_are_kept_as_they_were(modules, tmp_path):
    x = torch.ones(4, 64, dtype=torch.bfloat16)

    def run(sample, capture):
        capture.at(0, 1.0)
        x.fill_(1.0)
        for module in modules.values():
            module(x)
            x.add_(1.0)

    done = calibrate(run, modules, INPUTS, tmp_path, {"model": "m"}, samples=4, memory=2**30)
    assert [float(done.get(name).tokens.float().mean()) for name in NAMES] == [1, 2, 3, 4, 5]
