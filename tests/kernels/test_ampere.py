"""Ampere's and Ada's kernel in Gluon: its tiles compile for every card without spills, and launches take it
where it can read their operands."""

from dataclasses import replace

import pytest
import torch

from comfyui_nibble.kernels import plan, tuning
from comfyui_nibble.kernels.quant_linear import launch
from comfyui_nibble.kernels.target import Target, triton_version
from comfyui_nibble.quant_core.evaluation.bench.predict import kernels
from comfyui_nibble.tests.kernels import gate

TARGETS = {arch: Target("cuda", arch, triton_version()) for arch in (80, 86, 87, 89)}
ADA = Target("cuda", 89, (3, 6))
LAYERS = ("group", "channel", "W8A8")


def problem_of(grain, target, tokens=4608):
    return kernels.problem_of(target, kernels.spec_of(grain, 3072, 3072, 32), tokens)


def tiles_of(grain, target, tokens=4608):
    return [t for t in tuning.candidates(target, problem_of(grain, target, tokens)) if t.gluon]


# With everything that a launch may have, for every card; what else there is for one card.
CASES = [
    (a, grain, i, "") for a in TARGETS for grain in LAYERS for i in range(len(tiles_of(grain, TARGETS[a])))
]
CASES += [
    (89, grain, i, kind)
    for grain in LAYERS
    for i in range(len(tiles_of(grain, TARGETS[89])))
    for kind in ("unsigned", "fp32 sums", "least", "fp32 scales")
    if kind != "unsigned" or grain == "group"
]


def job_of(arch, grain, index, kind):
    target, problem = TARGETS[arch], problem_of(grain, TARGETS[arch])
    tile = tiles_of(grain, target)[index]
    if kind == "unsigned":
        problem = replace(problem, kernel="gemm_u4s4")
    if kind == "least":
        return kernels.product(target, problem, tile, rank=0, has_bias=False)
    job = kernels.product(target, problem, tile, accumulate=kind == "fp32 sums", exact=kind != "fp32 scales")
    if kind == "fp32 sums":
        return job.with_pointers("fp16").with_pointers("fp32", "y_ptr")
    return job.with_pointers("fp32", "sw_ptr") if kind == "fp32 scales" else job


@pytest.fixture(scope="module")
def compiled():
    with gate.pool() as pool:
        yield {case: pool.submit(gate.compile_kernel, *job_of(*case).arguments) for case in CASES}


@pytest.mark.parametrize(("arch", "grain", "index", "kind"), CASES)
def test_compiles(compiled, arch, grain, index, kind):
    result, target = compiled[arch, grain, index, kind].result(), TARGETS[arch]
    assert result.spills == 0
    assert result.shared <= target.shared_bytes
    wanted = (
        "IMMA.16832.S8.S8" if grain == "W8A8" else f"IMMA.16864.{'U4' if kind == 'unsigned' else 'S4'}.S4"
    )
    assert any(name.startswith(wanted) for name in result.instructions)


def test_candidates_come_first_and_only_where_they_fit():
    problem = problem_of("group", ADA)
    kinds = [t.gluon for t in tuning.candidates(ADA, problem)]
    assert kinds[0]
    assert kinds == sorted(kinds, reverse=True)
    for other in (replace(ADA, triton=(3, 5)), replace(ADA, triton=(3, 9)), replace(ADA, triton=None)):
        assert not any(t.gluon for t in tuning.candidates(other, problem))
    for arch in (75, 100, 120):
        target = replace(ADA, arch=arch)
        assert not any(t.gluon for t in tuning.candidates(target, problem_of("group", target)))
    changes = (
        {"tokens": 64},
        {"channels": 3080},
        {"row_bytes": 1536 + 32},
        {"scales": plan.SLICE, "block": 128},
    )
    for change in changes:
        assert not any(t.gluon for t in tuning.candidates(ADA, replace(problem, **change)))


def launched(monkeypatch, offset=0, channels=144, width=512):
    """The kernel that a launch on a card took and what it was given, with nothing run."""
    taken = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: taken.append((self.name, grid, args, kwargs))

    from comfyui_nibble.kernels.quant_linear import ampere

    monkeypatch.setattr(launch, "kernel_target", lambda device: ADA)
    monkeypatch.setattr(launch, "_chosen", launch._chosen.__wrapped__)
    monkeypatch.setattr(ampere, "ampere_s4s4", Kernel("ampere"))
    monkeypatch.setattr(launch.kernels, "gemm_s4s4", Kernel("triton"))
    weight = torch.zeros(channels, width, dtype=torch.int8)[:, offset : offset + 256]
    launch.gemm(
        torch.zeros(100, 256, dtype=torch.int8), torch.ones(8, 100), weight,
        torch.ones(8, channels, dtype=torch.bfloat16), None, None, None,
        torch.zeros(100, channels, dtype=torch.bfloat16),
        "gemm_s4s4", 0, plan.GROUP, False, 32, (256,), True, False,
    )  # fmt: skip
    ((name, grid, args, kwargs),) = taken
    return name, grid, args, kwargs


def test_a_launch_takes_it(monkeypatch):
    from comfyui_nibble.kernels.quant_linear import ampere

    names = ampere.ampere_s4s4.arg_names
    name, grid, args, kwargs = launched(monkeypatch)
    assert (name, grid) == ("ampere", (2,))
    assert [*names[: len(args)], *kwargs] == [*names, "num_warps"]
    given = dict(zip(names, args, strict=False)) | kwargs
    assert (given["KB"], given["ld_sx"], given["ld_sw"], given["ldw"], given["R"]) == (256, 100, 144, 512, 0)
    assert given["WM"] * given["WN"] == kwargs["num_warps"]


@pytest.mark.parametrize("change", [{"offset": 8}, {"width": 500}])
def test_what_copies_of_16_bytes_cannot_read_takes_triton(monkeypatch, change):
    assert launched(monkeypatch, **change)[0] == "triton"
