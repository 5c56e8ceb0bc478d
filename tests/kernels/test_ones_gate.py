"""Triton compiles an integer argument of exactly 1 into the kernel: one token, a rank of 1 whose rows are one
value apart. Nor is a rank a multiple of 16 in general, as a LoRA's beside the layer's own. Neither spills."""

from dataclasses import replace
from importlib import import_module

import pytest

from comfyui_nibble.kernels import tuning
from comfyui_nibble.kernels.target import Target, triton_version
from comfyui_nibble.quant_core.evaluation.bench.predict import kernels
from comfyui_nibble.tests.kernels import gate

ARCHS = (75, 80, 89, 90, 100, 120)
TARGETS = {arch: Target("cuda", arch, triton_version()) for arch in ARCHS}
# rank, rotation, prologue, smooth, grouped, bits, unsigned, planes
QUANTIZERS = {"SVDQuant": (1, 0, 0, True, True, 4, False, 2), "W8A8": (1, 128, 0, True, False, 8, False, 1)}
STRIDES = ("ld_low", "ld_up", "ld_down")
CASES = [(a, "product", grain, m) for a in ARCHS for grain in ("group", "channel", "W8A8") for m in (1, 4608)]
CASES = [c for c in CASES if c[:3:2] != (75, "W8A8")]
CASES += [(90, "product of odd rank", grain, 4608) for grain in ("channel", "W8A8")]
CASES += [(a, "quantizer", name, m) for a in ARCHS for name in QUANTIZERS for m in (1, 4608)]


def job_of(arch, what, name, tokens):
    """A Compilation with these arguments as constants, as Triton's launcher makes it."""
    target = TARGETS[arch]
    if what == "quantizer":
        job = kernels.quantizer(target, *QUANTIZERS[name])
    else:
        problem = kernels.problem_of(target, kernels.spec_of(name, 3072, 3072, 1), tokens)
        tile = next(t for t in tuning.candidates(target, problem))
        job = kernels.product(target, problem, tile, rank=1)
    if what == "product of odd rank":
        return replace(job, signature=job.signature | dict.fromkeys(STRIDES, "i32"))
    fn = getattr(import_module(job.module), job.kernel)
    ones = {
        *STRIDES,
        *(() if job.module.endswith("quant_linear.triton") else ("R",)),
    }  # there not specialised
    ones = (ones | ({"M", "tokens"} if tokens == 1 else set())) & set(fn.arg_names)
    signature = {k: v for k, v in job.signature.items() if k not in ones}
    return replace(job, signature=signature, constants=job.constants | dict.fromkeys(sorted(ones), 1))


@pytest.fixture(scope="module")
def compiled():
    with gate.pool() as pool:
        yield {case: pool.submit(gate.compile_kernel, *job_of(*case).arguments) for case in CASES}


@pytest.mark.parametrize(("arch", "what", "name", "tokens"), CASES)
def test_no_spills(compiled, arch, what, name, tokens):
    result = compiled[arch, what, name, tokens].result()
    assert result.spills == 0, f"{result.spills} bytes or registers spilled"
    assert result.shared <= TARGETS[arch].shared_bytes
