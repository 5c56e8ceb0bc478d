import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_nibble.quant_core.calibration import Calibration, CalibrationError, calibrate, file, plan_passes
from comfyui_nibble.quant_core.calibration.capture import is_held_out
from comfyui_nibble.quant_core.calibration.file import merge
from comfyui_nibble.quant_core.calibration.observe import Observation
from comfyui_nibble.quant_core.calibration.plan import Input
from comfyui_nibble.quant_core.layer.statistics import InputStatistics, NonFiniteActivation

pytestmark = pytest.mark.quick

WIDTHS = {"a": 64, "b": 128, "c": 64}
INPUTS = [Input(name, width, ((0, width),), name) for name, width in WIDTHS.items()]


@pytest.fixture
def modules():
    return {name: torch.nn.Linear(width, 8) for name, width in WIDTHS.items()}


def runner(modules, log=None, fail_at=None):
    def run(sample, capture):
        for step in range(2):
            if log is not None:
                log.append(sample)
            capture.at(step, 1 - step / 2)
            for i, (name, module) in enumerate(modules.items()):
                module(
                    torch.randn(
                        1,
                        20,
                        WIDTHS[name],
                        generator=torch.Generator().manual_seed(100 * sample + 10 * step + i),
                    )
                )
        if fail_at == sample:
            raise KeyboardInterrupt

    return run


def go(modules, folder, *, memory=2**30, meta=None, log=None, fail_at=None, samples=5, seed=0):
    meta = meta or {"model": "m"}
    return calibrate(
        runner(modules, log, fail_at),
        modules,
        INPUTS,
        folder,
        meta,
        samples=samples,
        memory=memory,
        reservoir=16,
        seed=seed,
    )


def assert_same(a: Calibration, b: Calibration):
    assert a.names == b.names
    for name in a.names:
        x, y = a.get(name), b.get(name)
        assert x.count == y.count
        for leaf in ("absmax", "tokens", "keys", "timesteps"):
            assert torch.equal(getattr(x, leaf), getattr(y, leaf))
        assert all(torch.equal(x.hessians[k], y.hessians[k]) for k in x.hessians)


def test_held_out_tokens_are_not_fitted(modules, tmp_path):
    c = go(modules, tmp_path)
    stats = c.get("a")
    assert [is_held_out(i, 5) for i in range(5)] == [False, False, False, True, False]
    assert stats.count == 4 * 2 * 20
    seen = torch.cat(
        [
            torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(300 + 10 * step))[0]
            for step in range(2)
        ]
    ).bfloat16()
    assert all((seen == token).all(1).any() for token in stats.tokens)
    assert set(stats.timesteps.tolist()) == {1.0, 0.5}


def test_deterministic_for_a_seed(modules, tmp_path):
    a, b, c = (go(modules, tmp_path / n, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert_same(a, b)
    assert a.hash == b.hash != c.hash
    assert not torch.equal(a.get("a").tokens, c.get("a").tokens)


def test_interrupted_run_goes_on_with_the_same_result(modules, tmp_path):
    whole = go(modules, tmp_path / "whole")
    log = []
    with pytest.raises(KeyboardInterrupt):
        go(modules, tmp_path / "cut", fail_at=2)
    with pytest.raises(CalibrationError, match="stopped after 2 of 5 samples"):
        Calibration(tmp_path / "cut")
    resumed = go(modules, tmp_path / "cut", log=log)
    assert min(log) == 2
    assert_same(whole, resumed)


def test_finished_run_samples_nothing_again(modules, tmp_path):
    go(modules, tmp_path)
    log = []
    go(modules, tmp_path, log=log)
    assert log == []


def test_another_calibration_in_the_folder_is_kept(modules, tmp_path):
    """With other options, another model, or more memory while it is not finished: hours of work."""
    go(modules, tmp_path)
    [path] = tmp_path.glob("pass-*")
    before, log = path.read_bytes(), []
    with pytest.raises(
        CalibrationError,
        match=r"holds 5 of 5 samples of another calibration \(model: m there, other here\)\. Name another",
    ):
        go(modules, tmp_path, meta={"model": "other"}, log=log)
    with pytest.raises(CalibrationError, match=r"\(samples: 5 there, 4 here"):
        go(modules, tmp_path, samples=4, log=log)
    assert not log
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["pass-000.safetensors"]


def test_a_file_of_the_users_in_the_folder_is_kept(modules, tmp_path):
    save_file({"mine": torch.zeros(2)}, tmp_path / "pass-000.safetensors")
    with pytest.raises(
        CalibrationError,
        match=r"pass-000.safetensors: a safetensors file, but not statistics .*would be written over\. Name "
        r"another",
    ):
        go(modules, tmp_path)
    assert load_file(tmp_path / "pass-000.safetensors").keys() == {"mine"}


def test_several_passes_equal_one(modules, tmp_path):
    one = go(modules, tmp_path / "one")
    many = go(modules, tmp_path / "many", memory=1)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 3
    assert_same(one, many)


def test_passes_stay_within_the_memory():
    size = lambda i: InputStatistics.nbytes(i.width, i.blocks, 16)
    passes = plan_passes(INPUTS, size(INPUTS[0]) + size(INPUTS[1]), 16)
    assert [[i.name for i in p] for p in passes] == [["a", "b"], ["c"]]


def test_missing_pass_is_named(modules, tmp_path):
    go(modules, tmp_path, memory=1)
    (tmp_path / "pass-001.safetensors").unlink()
    with pytest.raises(CalibrationError, match="2 of 3 passes"):
        Calibration(tmp_path)


def test_merge_of_two_seeds(modules, tmp_path):
    a, b = go(modules, tmp_path / "a"), go(modules, tmp_path / "b", seed=1, samples=4)
    merge([a.path, b.path], tmp_path / "both")
    both = Calibration(tmp_path / "both")
    assert both.get("b").count == a.get("b").count + b.get("b").count
    assert both.meta["samples"] == 9


def test_pieces_of_a_merge_are_of_a_size_whatever_the_passes(modules, tmp_path, monkeypatch):
    one, three = go(modules, tmp_path / "one"), go(modules, tmp_path / "three", memory=1)
    merge([one.path, one.path], tmp_path / "a")
    merge([three.path, three.path], tmp_path / "b")
    assert [len(Calibration(tmp_path / name).files) for name in "ab"] == [1, 1]
    monkeypatch.setattr(file, "PIECE", 1)
    merge([one.path, one.path], tmp_path / "c")
    fine, coarse = Calibration(tmp_path / "c"), Calibration(tmp_path / "a")
    assert len(fine.files) == 3
    for name in coarse.names:
        for block, hessian in coarse.get(name).hessians.items():
            assert fine.get(name).hessians[block].equal(hessian)


def test_other_model_is_refused_and_both_are_named(modules, tmp_path):
    with pytest.raises(CalibrationError, match="made with model m, this one is n"):
        go(modules, tmp_path).require_model("n")


def test_nan_stops_and_keeps_finished_samples(modules, tmp_path):
    good = runner(modules)

    def run(sample, capture):
        good(sample, capture)
        if sample == 2:
            modules["b"](torch.full((1, 1, 128), torch.nan))

    with pytest.raises(NonFiniteActivation, match="layer b, channel 0, sample 2, step 1"):
        calibrate(run, modules, INPUTS, tmp_path, {"model": "m"}, samples=5, memory=2**30, reservoir=16)
    with pytest.raises(CalibrationError, match="stopped after 2 of 5"):
        Calibration(tmp_path)


def test_broken_files_are_named(modules, tmp_path):
    path = go(modules, tmp_path / "c").path / "pass-000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CalibrationError, match=r"pass-000.safetensors: not a whole safetensors file"):
        Calibration(path)
    with pytest.raises(CalibrationError, match="not found"):
        Calibration(tmp_path / "nothing.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match=r"holds no .safetensors"):
        Calibration(tmp_path / "empty")
    # Its part is gathered again; the file itself stays, under another name.
    assert go(modules, tmp_path / "c").names == ["a", "b", "c"]
    assert path.with_name("pass-000.safetensors.damaged").read_bytes() == whole[: len(whole) // 2]


def test_inputs_that_hold_a_tensor_are_seen_as_it(tmp_path):
    """ComfyUI's sparse tensors (TRELLIS.2) reach their linear layers whole."""

    class Sparse:
        def __init__(self, feats):
            self.feats = feats

    class SparseLinear(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.feats)

    layer, x = SparseLinear(64, 8), torch.randn(20, 64)

    def run(sample, capture):
        capture.at(0, 1.0)
        layer(Sparse(x))

    found = calibrate(
        run, {"a": layer}, INPUTS[:1], tmp_path, {"model": "m"}, samples=1, memory=2**30, reservoir=16
    ).get("a")
    assert found.count == 20
    assert torch.allclose(found.absmax, x.abs().amax(0))
    with Observation().watching({"a": layer}) as seen:
        layer(Sparse(x))
    assert seen.rows == {"a": 20}


@pytest.mark.parametrize("shape", [(0, 64), (1, 0, 64)])
def test_calls_without_tokens_are_skipped(modules, tmp_path, shape):
    """As of a network that cuts its text away: statistics and observation are those of the other calls."""

    good = runner(modules)

    def run(sample, capture):
        modules["a"](torch.empty(shape))
        good(sample, capture)

    want = go(modules, tmp_path / "a")
    found = calibrate(
        run, modules, INPUTS, tmp_path / "b", {"model": "m"}, samples=5, memory=2**30, reservoir=16
    )
    assert (found.get("a").count, found.get("b").count) == (want.get("a").count, want.get("b").count)
    assert torch.equal(found.get("a").absmax, want.get("a").absmax)
    layers = {"a": torch.nn.Linear(64, 8), "b": torch.nn.Linear(64, 8)}
    with Observation().watching(layers) as seen:
        empty = torch.empty(shape)
        layers["a"](empty)
        layers["b"](empty)
        assert seen.to_json() == {"order": [], "shared": {}, "rows": {}}
        layers["b"](torch.randn(3, 64))
        layers["a"](torch.randn(2, 64))
    assert seen.to_json() == {"order": ["b", "a"], "shared": {}, "rows": {"b": 3, "a": 2}}
