"""GPTQ's kernel in Triton's interpreter against the loop in torch, and compiled for every card."""

import pytest
import torch

from comfyui_nibble.kernels.gptq import launch
from comfyui_nibble.kernels.operator import nvfp4
from comfyui_nibble.kernels.operator.codes import INT, NVFP4
from comfyui_nibble.kernels.operator.quantizers import dequantize
from comfyui_nibble.kernels.target import Target, target_of, triton_version
from comfyui_nibble.quant_core.methods import gptq
from comfyui_nibble.tests.kernels import gate
from comfyui_nibble.tests.support import relative_error

TARGETS = {str(a): Target("cuda", a, triton_version()) for a in (75, 80, 86, 89, 90, 100, 120)}
TARGETS |= {a: Target("hip", a, triton_version()) for a in ("gfx942", "gfx1100", "gfx1201")}
FORMS = [(False, INT), (True, INT), (False, NVFP4)]


def problem(k, n, seed=0):
    """A weight (K, N), and the factor of correlated second moments in two blocks."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * k, k, generator=g) @ torch.randn(k, k, generator=g)
    half = k // 2
    of = lambda part: gptq.upper_factor(part.T @ part / len(part), 0.01)
    return torch.randn(k, n, generator=g), {(0, half): of(x[:, :half]), (half, k): of(x[:, half:])}


@pytest.fixture
def both(monkeypatch):
    """A function that rounds by the loop and by the kernel: ((codes, scales), (codes, scales))."""

    def run(weight, factor, *args, **kwargs):
        want = gptq.quantize(weight.clone(), factor, *args, **kwargs)
        monkeypatch.setattr(gptq, "has_kernels", lambda target: True)
        return want, gptq.quantize(weight.clone(), factor, *args, **kwargs)

    return run


@pytest.mark.quick
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("k", "n"), [(384, 33), (128, 16)])
def test_codes_and_scales_are_those_of_the_loop(both, bits, k, n):
    weight, factor = problem(k, n)
    (codes, scales), (found, made) = both(weight, factor, bits, 64, torch.bfloat16)
    # Up to sums in another order: a code at an edge may go either way, and moves those behind it.
    assert (codes != found).double().mean() < 0.01
    values = [dequantize(c.T.float(), s.float().T, "group", 64) for c, s in ((codes, scales), (found, made))]
    assert relative_error(*values) < 0.02
    assert relative_error(scales, made) < 0.005
    # Of the first block nothing is a sum of more than one term before its second row.
    assert torch.equal(codes[0], found[0])
    assert torch.equal(scales[0], made[0])


def test_the_nvfp4_grid_is_that_of_the_loop(both):
    weight, factor = problem(384, 33)
    weight[:, 5] *= 1e3
    (codes, scales), (found, made) = both(weight, factor, 4, 16, torch.bfloat16, grid=NVFP4)
    assert set(codes.unique().tolist()) <= {s * v for s in (-1, 1) for v in nvfp4.DOUBLED}
    assert torch.equal(nvfp4.stored(scales.T).T, scales)
    assert (codes != found).double().mean() < 0.02
    values = [dequantize(c.T.float(), s.T, "group", 16) for c, s in ((codes, scales), (found, made))]
    assert relative_error(*values) < 0.02
    assert torch.equal(codes[0], found[0])
    assert torch.equal(scales[0], made[0])


def test_given_scales_of_wide_groups(both):
    """RobuQ's: one scale for all in-channels, which no block begins."""
    weight, factor = problem(384, 20)
    given = (weight.abs().amax(0) / 3).half()[None]
    (codes, _), (found, made) = both(weight, factor, 4, 384, torch.float16, scales=given)
    assert made is given
    assert (codes != found).double().mean() < 0.01


def test_a_block_is_five_launches(monkeypatch):
    """What torch does around the kernel, counted by its dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            # `fill_` is of the tests, which leave no memory unwritten.
            views = (
                "slice",
                "select",
                "t.",
                "transpose",
                "permute",
                "empty",
                "as_strided",
                "alias",
                "view",
                "detach",
                "fill_.",
            )
            if not str(func).removeprefix("aten.").startswith(views):
                self.calls += (str(func),)
            return func(*args, **(kwargs or {}))

    weight, factor = problem(256, 16)
    factor = {(0, 256): torch.block_diag(*factor.values())}
    monkeypatch.setattr(gptq, "has_kernels", lambda target: True)
    monkeypatch.setattr(launch, "block", lambda *args: None)
    target_of("cpu")  # looks at the machine once
    with Count() as count:
        gptq.quantize(weight, factor, 4, 64, torch.bfloat16)
    # Two blocks of two, and one product between them; with the diagonal of ones, which is not told from the
    # tests' fills, and the kernel that is five a block.
    kinds = [name.split(".")[1].rstrip("_") for name in count.calls]
    a_block = ["zeros", "linalg_solve_triangular"]
    assert kinds == [*a_block, "addmm", *a_block]


@pytest.fixture(scope="module")
def compiled():
    signature = dict.fromkeys(("w_ptr", "inverse_ptr", "error_ptr"), "fp32*")
    signature |= {"scale_ptr": "bf16*", "codes_ptr": "i8*", "SMALLEST": "fp32"}
    signature |= dict.fromkeys(("N", "COUNT", "FIRST", "GROUP", "row_inverse", "column_inverse"), "i32")
    with gate.pool() as pool:
        yield {
            (name, given, grid): pool.submit(
                gate.compile_kernel,
                "comfyui_nibble.kernels.gptq.triton",
                "gptq_block_kernel",
                signature | ({"scale_ptr": "fp32*"} if grid == NVFP4 else {}),
                launch.constants(target, 4, given, grid),
                target.arch,
                launch.options(given, grid),
            )
            for name, target in TARGETS.items()
            for given, grid in FORMS
        }


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("given", "grid"), FORMS)
def test_compiles_without_spills(compiled, name, given, grid):
    result = compiled[name, given, grid].result()
    assert result.spills == 0
    assert result.shared <= TARGETS[name].shared_bytes
