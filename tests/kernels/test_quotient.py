"""The quantizer's quotient in three operations against IEEE division, in numpy: an inverse that is off by a
unit, as a GPU's approximation may be, changes nothing."""

import numpy as np
import pytest

F32, F64 = np.float32, np.float64


def fma(a, b, c):
    """a b + c, rounded once: the product of two fp32 has 48 bits, and the sums here lose none of 53 before
    the last rounding that would matter."""
    return (a.astype(F64) * b.astype(F64) + c.astype(F64)).astype(F32)


def quotient(v, by, inverse):
    near = v * inverse
    return fma(fma(-near, by, v), inverse, near)


def inverses(by):
    """1 / by to the nearest, and its two neighbours."""
    exact = (1 / by.astype(F64)).astype(F32)
    return exact, np.nextafter(exact, F32(0)), np.nextafter(exact, F32(np.inf))


@pytest.mark.quick
@pytest.mark.parametrize("bits", [8, 11], ids=["bf16", "fp16"])
def test_by_a_factor_of_16_bits_it_is_exact(bits):
    """All pairs of significands; powers of two change no rounding within the range."""
    values = np.arange(2 ** (bits - 1), 2**bits).astype(F32)
    v, by = values[:, None], values[None, :]
    for inverse in inverses(by):
        assert np.array_equal(quotient(v, by, inverse), v / by)


def test_by_a_scale_codes_are_equal():
    """20 million smoothed values and scales: no quotient differs by more than one unit, fewer than one in a
    million differ at all, and no code does."""
    rng = np.random.default_rng(0)
    units = codes = 0
    for _ in range(20):
        v = (rng.standard_normal(1_000_000) / rng.uniform(0.5, 2, 1_000_000)).astype(F32)
        by = (np.abs(rng.standard_normal(1_000_000)).astype(F32) + F32(0.5)) / F32(7)
        exact = v / by
        for inverse in inverses(by):
            found = quotient(v, by, inverse)
            apart = np.abs(found.view(np.int32) - exact.view(np.int32))
            assert apart.max() <= 1
            units += int((apart > 0).sum())
            codes += int((np.rint(found) != np.rint(exact)).sum())
    assert units < 60
    assert codes == 0


@pytest.mark.quick
def test_values_that_round_half_way_keep_their_code():
    """(k + 1/2) scale, where it is a float: the quotient is k + 1/2 and rounds to even, as the division's."""
    rng = np.random.default_rng(1)
    by = (rng.uniform(0.1, 4, 100_000)).astype(F32).view(np.int32) & ~0xFF  # bits for the product
    by = by.view(F32)
    for k in range(7):
        v = by * F32(k + 0.5)
        for inverse in inverses(by):
            assert np.array_equal(quotient(v, by, inverse), np.full_like(by, k + 0.5))
