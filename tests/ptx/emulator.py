"""The entry: run a kernel over a grid."""

import itertools
from collections import Counter

import numpy as np

from comfyui_nibble.tests.ptx.errors import EmulationError
from comfyui_nibble.tests.ptx.machine import Cta
from comfyui_nibble.tests.ptx.memory import GlobalMemory
from comfyui_nibble.tests.ptx.parser import WIDTHS, Program, parse


def _param_bits(value, kind: str, name: str, memory: GlobalMemory) -> int:
    """An argument as an integer, a float as its bits; an array becomes a buffer and gives its address."""
    bits = WIDTHS[kind]
    if isinstance(value, np.ndarray):
        if bits != 64:
            raise EmulationError(f"{name}: an array for a parameter of type {kind}")
        return memory.add(value, name)
    if isinstance(value, (float, np.floating)):
        return int(np.array(value, f"f{bits // 8}").view(f"u{bits // 8}"))
    return int(value)


def _bind(program: Program, args: list, memory: GlobalMemory) -> dict[str, int]:
    """The value of each parameter. Triton appends pointers to scratch memory, which a caller leaves out: they
    are null."""
    if len(args) > len(program.params):
        raise EmulationError(
            f"{len(args)} arguments for the {len(program.params)} parameters of {program.name}"
        )
    for name, kind in program.params[len(args) :]:
        if kind not in ("u64", "b64"):
            raise EmulationError(f"{name}: no argument, and it is no pointer but {kind}")
    values = [*args, *[0] * (len(program.params) - len(args))]
    return {
        name: _param_bits(v, kind, name, memory)
        for (name, kind), v in zip(program.params, values, strict=True)
    }


def run(ptx: str, grid: tuple, args: list, shared_bytes: int) -> dict[str, int]:
    """Run the first kernel of `ptx`, CTA after CTA, and return how often each opcode ran (once a CTA, not
    once a thread).

    `args` are ints, floats and C-contiguous numpy arrays; arrays are the kernel's buffers and are written in
    place. Missing trailing pointers are null. `shared_bytes` is the size of shared memory, static or dynamic.
    """
    program, memory, counts = parse(ptx), GlobalMemory(), Counter()
    params = _bind(program, args, memory)
    grid = (*grid, 1, 1)[:3]
    steps = [None] * len(program.instructions)
    with np.errstate(all="ignore"):
        for z, y, x in itertools.product(*(range(n) for n in reversed(grid))):
            try:
                Cta(program, params, memory, shared_bytes, (x, y, z), grid).run(steps, counts)
            except (EmulationError, NotImplementedError) as error:
                error.add_note(f"in CTA ({x}, {y}, {z}) of {program.name}")
                raise
    return dict(counts)
