"""The activation quantizer with a learned transform compiles for every card: 16-bit tensor cores, no spills,
shared memory that fits.

What dispatch refuses for a card is not compiled; `test_dispatch` has the reasons.
"""

import re

import pytest

from comfyui_nibble.kernels import dispatch, tuning
from comfyui_nibble.kernels.cards import MMA, card_of
from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.quant_core.evaluation.bench.predict.kernels import KERNELS
from comfyui_nibble.tests.kernels import gate
from comfyui_nibble.tests.kernels.test_compile_gate import SIXTEEN_BIT, TARGETS

QUANTIZER = {
    "x_ptr": "bf16*", "smooth_ptr": "fp32*", "factor_ptr": "fp32*", "mod_scale_ptr": "bf16*",
    "mod_shift_ptr": "bf16*", "q_ptr": "i8*",
    "s_ptr": "fp32*", "M": "i32", "tokens": "i32", "clip": "fp32", "eps": "fp32",
} | dict.fromkeys(("ldx", "ldq", "plane", "ld_mod"), "i32:16")  # fmt: skip
# p1, p2, slices, per slice, prologue, bits
SETTINGS = {
    "3072 in 4": (24, 32, 4, False, 0, 4),
    "3072 in 4 after LayerNorm": (24, 32, 4, False, 2, 4),
    "3072 in 4, a transform each": (24, 32, 4, True, 0, 4),
    "3072": (48, 64, 1, False, 0, 4),
    "3072 in 16, 1 bit": (12, 16, 16, False, 0, 1),
    "12288 in 4 after GELU": (48, 64, 4, False, 1, 4),
    "12288": (96, 128, 1, False, 0, 4),
    "1152 in 4": (16, 18, 4, False, 2, 4),
    "1152 in 16": (8, 9, 16, False, 0, 8),
    "4608 in 4": (32, 36, 4, False, 2, 4),
    "4608 in 4, a transform each": (32, 36, 4, True, 0, 4),
}


def case_of(arch, name):
    """(tile, constants) of a setting, None where dispatch refuses it."""
    from comfyui_nibble.kernels.quant_activation.launch import kronecker_constants

    p1, p2, slices, per_slice, prologue, bits = SETTINGS[name]
    width = p1 * p2 * slices
    act = ActivationSpec(bits, "token")
    part = PartSpec(
        0, width, WeightSpec(4, "channel"), act, smooth=True, kronecker=(p1, p2), per_slice=per_slice
    )
    choice = dispatch.choose(LinearSpec(width, 3072, (part,)), TARGETS[arch])
    if choice.path == "eager" or dispatch.FUSED in dict(choice.refused):
        return None
    tile = tuning.kronecker_tile(TARGETS[arch], p1, p2, slices, per_slice)
    planes = 0 if card_of("cuda", arch).int4 == MMA and bits <= 4 else 2
    return tile, kronecker_constants(
        TARGETS[arch], tile, p1, p2, slices, per_slice, prologue, True, bits, False, planes
    )


CASES = [(arch, name) for arch in TARGETS for name in SETTINGS if case_of(arch, name)]


@pytest.fixture(scope="module")
def compiled(request):
    """{case: Future of Compiled} of the tests that were selected, on two processes."""
    with gate.pool() as pool:
        selected = [
            i.callspec for i in request.session.items if i.path == request.path and hasattr(i, "callspec")
        ]
        jobs = {}
        for case in (tuple(c.params.values()) for c in selected):
            tile, constants = case_of(*case)
            module, options = (
                f"{KERNELS}.quant_activation.kronecker",
                {"num_warps": tile.warps, "num_stages": 1},
            )
            jobs[case] = pool.submit(
                gate.compile_kernel,
                module,
                "quantize_kronecker_kernel",
                QUANTIZER,
                constants,
                case[0],
                options,
            )
        yield jobs


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_quantizer(compiled, arch, name):
    result = compiled[arch, name].result()
    assert set(result.instructions)
    assert all(re.match(SIXTEEN_BIT, found) for found in result.instructions)
    assert result.spills == 0, f"{result.spills} bytes or registers spilled"
    assert result.shared <= TARGETS[arch].shared_bytes
    assert not result.serialized, "ptxas serialised the wgmmas"
    if not isinstance(arch, str):  # what the requirement of dispatch counts is what the compiler takes
        assert result.shared <= tuning.kronecker_tile(TARGETS[arch], *SETTINGS[name][:4]).shared


def test_every_card_takes_the_sizes_of_flux():
    for arch in TARGETS:
        assert case_of(arch, "3072 in 4")
        assert bool(case_of(arch, "3072")) == (arch != "gfx1100")
        assert case_of(arch, "1152 in 4")
        assert bool(case_of(arch, "12288 in 4 after GELU")) == (not str(arch).startswith("gfx1"))
        assert bool(case_of(arch, "12288")) == (not isinstance(arch, str))
