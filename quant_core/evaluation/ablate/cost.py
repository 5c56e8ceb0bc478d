"""Arithmetic that a quantized layer needs beside its integer product, in multiply-adds of one token."""

from collections.abc import Iterable
from fractions import Fraction

from ....kernels.operator.spec import LinearSpec, PartSpec


def beside(spec: LinearSpec) -> int:
    """Multiply-adds of a token beside the product: p1 + p2 a channel of a Kronecker pair, log2 of the block
    of a Hadamard rotation (its fast form), rank (K + N) of a low-rank branch and K more of each principal
    component, of each part. Smoothing, scales and rounding are left out: one or two a channel."""
    return sum(
        part.width * (_a_channel(part) + part.principal) + part.rank * (part.width + spec.out_features)
        for part in spec.parts
    )


def _a_channel(part: PartSpec) -> int:
    return sum(part.kronecker) + max(0, part.rotation.bit_length() - 1)


def product(spec: LinearSpec) -> int:
    """Multiply-adds of a token in the product."""
    return spec.width * spec.out_features


def relative(specs: Iterable[LinearSpec]) -> Fraction:
    """What is beside the products over the products: the mean over layers, weighted by their products.
    Weight-only layers are left out."""
    specs = [spec for spec in specs if not spec.weight_only]
    return Fraction(sum(map(beside, specs)), sum(map(product, specs)))
