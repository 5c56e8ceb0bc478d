"""Instructions that pass values between the 32 threads of a warp: shfl.sync and redux.sync."""

import numpy as np

from comfyui_nibble.tests.ptx.errors import EmulationError
from comfyui_nibble.tests.ptx.operation import Operation
from comfyui_nibble.tests.ptx.parser import Instruction

WARP = 32
FULL_MASK = 0xFFFF_FFFF

_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _check_members(mask: np.ndarray):
    if (mask != FULL_MASK).any():
        raise EmulationError("only whole warps are emulated, so the member mask must name all threads")


def _source_lane(mode: str, lane, step, clamp):
    """Which lane each lane reads, and whether that lies in its segment; after the pseudocode of "shfl.sync"
    in the PTX ISA."""
    segment = clamp >> 8 & 0x1F
    first = lane & segment
    last = first | (clamp & 0x1F & ~segment)
    step = step & 0x1F
    if mode == "up":
        source = lane - step
        return source, source >= last
    source = {"down": lane + step, "bfly": lane ^ step, "idx": first | (step & ~segment)}[mode]
    return source, source <= last


def _shuffle(instruction: Instruction) -> Operation:
    mode = instruction.parts[1] if len(instruction.parts) > 1 else ""
    instruction.modifiers("sync", mode)
    if mode not in ("up", "down", "bfly", "idx"):
        raise instruction.unsupported()

    def apply(values, step, clamp, members):
        _check_members(members)
        thread = np.arange(len(values), dtype=np.int64)
        lane = thread % WARP
        source, inside = _source_lane(mode, lane, step.astype(np.int64), clamp.astype(np.int64))
        return values[np.where(inside, thread - lane + source, thread)], inside

    return Operation(("b32", "u32", "u32", "u32"), apply, convergent=True)


def _reduce(instruction: Instruction) -> Operation:
    """redux: every thread gets the reduction over its warp."""
    name = instruction.parts[1] if len(instruction.parts) > 1 else ""
    instruction.modifiers("sync", name)
    if name not in _REDUCTIONS:
        raise instruction.unsupported()

    def apply(values, members):
        _check_members(members)
        found = _REDUCTIONS[name].reduce(values.reshape(-1, WARP), axis=1, dtype=values.dtype)
        return np.repeat(found, WARP)

    return Operation((instruction.type, "u32"), apply, convergent=True)


BUILDERS = {"shfl": _shuffle, "redux": _reduce}
