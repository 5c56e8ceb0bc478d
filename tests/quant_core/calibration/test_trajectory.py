import random

import pytest
import torch

from comfyui_nibble.quant_core.calibration import Calibration, calibrate, trajectory
from comfyui_nibble.quant_core.calibration.plan import Input
from comfyui_nibble.quant_core.calibration.trajectory import Recorder, Trajectory

pytestmark = pytest.mark.quick

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def replayed(recorder, index=0):
    return Trajectory(recorder.calls, recorder.tensors.__getitem__).arguments(index)


def recorded(*args, **kwargs):
    recorder = Recorder()
    recorder.add(0, 0, 0, 1.0, False, args, kwargs)
    return recorder


@pytest.mark.parametrize(
    "value",
    [
        X,
        X.bfloat16(),
        X.half().mT,
        X[0, 0, 0],
        X > 0,
        torch.arange(3),
        torch.zeros(0, 4),
        torch.tensor([float("nan"), -0.0]),
    ],
    ids=["fp32", "bf16", "not contiguous", "scalar", "bool", "int64", "empty", "nan"],
)
def test_tensors_come_back_bit_exact(value):
    (got,), _ = replayed(recorded(value))
    assert got.dtype == value.dtype
    assert got.shape == value.shape
    as_bytes = lambda t: t.contiguous().flatten().view(torch.uint8)
    assert torch.equal(as_bytes(got), as_bytes(value))


def test_a_timestep_expanded_from_one_value():
    """As some samplers hand it over: its stride is 0."""
    (got,), _ = replayed(recorded(torch.tensor(0.5).expand(1)))
    assert torch.equal(got, torch.tensor([0.5]))


def test_arguments_keep_their_form():
    y = X[:, 0].clone()
    options = {
        "cond": [0],
        "flag": True,
        "scale": 0.5,
        "sigmas": y,
        "patch": print,
        "patches": {"dit": [print]},
        3: "no text",
    }
    args, kwargs = replayed(
        recorded(X, [y, [None, 2]], (1, "a"), None, options=options, mask=None, callback=print)
    )
    assert torch.equal(args[0], X)
    assert torch.equal(args[1][0], y)
    assert args[1][1] == [None, 2]
    assert args[2:] == [[1, "a"], None]
    assert kwargs.keys() == {"options", "mask", "callback"}
    assert kwargs["mask"] is None
    assert kwargs["callback"] is None
    assert kwargs["options"].keys() == {
        "cond",
        "flag",
        "scale",
        "sigmas",
    }  # patches and callbacks belong to the run that was recorded
    assert (kwargs["options"]["cond"], kwargs["options"]["flag"], kwargs["options"]["scale"]) == (
        [0],
        True,
        0.5,
    )
    assert torch.equal(kwargs["options"]["sigmas"], y)


def test_nested_arguments():
    """As LTX-2 takes them: a latent and a timestep each for video and sound, and guides as a list of dicts
    with lists in them."""
    video, sound = X, X[:1] + 1
    guides = [
        {"latent_shape": [1, 2, 3], "pixel_mask": sound, "more": {"tensor": video, "names": ("a", "b")}}
    ]
    (x, timestep), kwargs = replayed(
        recorded([video, sound], (video[:, :1, 0], sound[:, :1, 0]), guides=guides, ref={"tokens": video})
    )
    assert [
        torch.equal(*pair)
        for pair in zip((*x, *timestep), (video, sound, video[:, :1, 0], sound[:, :1, 0]), strict=True)
    ] == [True] * 4
    (guide,) = kwargs["guides"]
    assert guide["latent_shape"] == [1, 2, 3]
    assert torch.equal(guide["pixel_mask"], sound)
    assert torch.equal(guide["more"]["tensor"], video)  # a name that the record itself uses
    assert guide["more"]["names"] == ["a", "b"]
    assert torch.equal(kwargs["ref"]["tokens"], video)


def test_replayed_tensors_are_copies():
    x = X.clone()
    recorder = recorded(x)
    x.zero_()
    for _ in range(2):
        (got,), _ = replayed(recorder)
        assert torch.equal(got, X)
        got.zero_()


def test_equal_tensors_are_stored_once():
    recorder = Recorder()
    for step in range(3):
        recorder.add(
            0,
            0,
            step,
            1.0,
            False,
            (X, X + step),
            {"context": X.clone(), "flat": X.flatten(), "ints": X.view(torch.int32)},
        )
    assert len(recorder.tensors) == 5  # X; X + 1; X + 2; the same bytes in another shape; in another dtype
    for i in range(3):
        args, kwargs = replayed(recorder, i)
        assert torch.equal(args[1], X + recorder.calls[i].step)
        assert torch.equal(kwargs["flat"], X.flatten())
        assert torch.equal(kwargs["ints"], X.view(torch.int32))


def test_the_same_calls_are_kept_whatever_the_order(monkeypatch):
    monkeypatch.setattr(trajectory, "CALLS", 7)
    offered = [(sample, step) for sample in range(6) for step in range(5)]

    def kept(order):
        recorder = Recorder()
        for sample, step in order:
            recorder.add(
                3, sample, step, 1 - step / 5, sample == 3, (torch.full((2,), 10.0 * sample + step), X), {}
            )
        return recorder

    first = kept(offered)
    assert len(first.calls) == 7
    assert len(first.tensors) == 8  # and none of a call that was pushed out
    assert len({c.sample for c in first.calls}) > 2
    for seed in range(3):
        again = kept(random.Random(seed).sample(offered, len(offered)))
        assert again.calls == first.calls
        assert again.tensors.keys() == first.tensors.keys()
    assert [(c.sample, c.step) for c in kept(offered[:7]).calls] != [(c.sample, c.step) for c in first.calls]


def test_prediction_of_a_network():
    recorder = Recorder()
    recorder.add(0, 0, 0, 1.0, False, (X,), {"scale": 2.0})
    t = Trajectory(recorder.calls, recorder.tensors.__getitem__)
    assert len(t) == 1
    assert torch.equal(t.run(lambda x, scale: x * scale, 0), 2 * X)
    assert torch.equal(t.run(lambda x, scale: (x * scale, None), 0), 2 * X)


# -- in a calibration


def calibrated(folder, samples=5, fail_at=None, record=True, memory=2**30):
    module = torch.nn.Linear(64, 8)
    names = ("a", "b")

    def run(sample, capture):
        for step in range(3):
            x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(10 * sample + step))
            capture.at(step, 1 - step / 3, *(((x,), {"context": x[:, :1], "step": step}) if record else ()))
            for name in names:
                modules[name](x)
        if sample == fail_at:
            raise KeyboardInterrupt

    modules = {name: torch.nn.Linear(64, 8) for name in names}
    inputs = [Input(name, module.in_features, ((0, 64),), name) for name in names]
    return calibrate(
        run, modules, inputs, folder, {"model": "m"}, samples=samples, memory=memory, reservoir=16
    )


def test_calls_of_a_calibration_in_the_order_of_sampling(tmp_path):
    t = calibrated(tmp_path).trajectory()
    assert [(c.sample, c.step) for c in t.calls] == [
        (sample, step) for sample in range(5) for step in range(3)
    ]
    assert [c.held_out for c in t.calls] == [c.sample == 3 for c in t.calls]
    assert [c.timestep for c in t.calls[:3]] == [1.0, 1 - 1 / 3, 1 - 2 / 3]
    for i, call in enumerate(t.calls):
        (x,), kwargs = t.arguments(i)
        want = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(10 * call.sample + call.step))
        assert torch.equal(x, want)
        assert torch.equal(kwargs["context"], want[:, :1])
        assert kwargs["step"] == call.step


@pytest.mark.parametrize("memory", [2**30, 1])
def test_stopped_calibration_goes_on_with_the_same_trajectory(tmp_path, monkeypatch, memory):
    """With memory 1 in two passes: the second samples the same calls again and must not record them twice."""
    monkeypatch.setattr(trajectory, "CALLS", 6)
    whole = calibrated(tmp_path / "whole").trajectory()
    with pytest.raises(KeyboardInterrupt):
        calibrated(tmp_path / "cut", fail_at=2, memory=memory)
    resumed = calibrated(tmp_path / "cut", memory=memory).trajectory()
    assert len(whole) == 6
    assert resumed.calls == whole.calls
    for i in range(6):
        assert torch.equal(resumed.arguments(i)[0][0], whole.arguments(i)[0][0])


def test_calibrations_without_recorded_calls_have_no_trajectory(tmp_path):
    """As those of version 0.3 and before."""
    calibrated(tmp_path, record=False)
    assert Calibration(tmp_path).trajectory() is None
