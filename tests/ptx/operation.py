"""An instruction that only computes: arrays in, arrays out, with no sight of the machine."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """`function` takes one array a source operand, of the numpy type that formats.RAW gives for its name in
    `inputs`.

    It returns the destination's array, or a tuple of them. A source that is a constant comes as an array of
    length one. A `convergent` operation mixes the threads of a warp: all must take part, and its arrays
    always have one value a thread. An operation that puts words together from bytes may `take_undefined`
    registers, as poison: LLVM fills bytes that nothing uses with a register that was never written.
    """

    inputs: tuple[str, ...]
    function: Callable
    convergent: bool = False
    take_undefined: bool = False
