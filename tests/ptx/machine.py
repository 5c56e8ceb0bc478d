"""One CTA's registers and its run through a program, all threads together."""

from collections import Counter
from functools import cache

import numpy as np

from comfyui_nibble.tests.ptx import bitwise, compare, convert, floats, integer, tensor, transfer, warp
from comfyui_nibble.tests.ptx.errors import DivergentBranch, EmulationError, UndefinedRegister
from comfyui_nibble.tests.ptx.formats import FLOATS, RAW, UNSIGNED
from comfyui_nibble.tests.ptx.memory import POISON, GlobalMemory, SharedMemory
from comfyui_nibble.tests.ptx.parser import (
    Address,
    Immediate,
    Instruction,
    Program,
    Register,
    Special,
    Symbol,
    flatten,
)

# A kernel that runs longer is taken for an endless loop.
STEP_LIMIT = 5_000_000

# With all threads in step there is nothing to wait for.
BARRIERS = {
    "bar.sync",
    "barrier.sync",
    "barrier.sync.aligned",
    "barrier.cta.sync",
    "barrier.cta.sync.aligned",
    "bar.warp.sync",
}
FENCES = {"membar.cta", "membar.gl", "fence.acq_rel.cta", "fence.acq_rel.gpu", "fence.sc.cta", "fence.sc.gpu"}

GENERAL = {**convert.BUILDERS, **compare.BUILDERS, **warp.BUILDERS, **tensor.BUILDERS}
INTEGER = {**integer.BUILDERS, **bitwise.BUILDERS}


@cache
def _constant(value: int, kind: str) -> np.ndarray:
    if kind == "pred":
        return np.array([value != 0])
    bits = 8 * np.dtype(RAW[kind]).itemsize
    return np.array([value & (1 << bits) - 1], UNSIGNED[bits]).view(RAW[kind])


def _compute(instruction: Instruction):
    """A step that reads the sources, computes, and writes the destinations."""
    table = (
        GENERAL if instruction.head in GENERAL else floats.BUILDERS if instruction.type in FLOATS else INTEGER
    )
    if instruction.head not in table:
        raise instruction.unsupported()
    operation = table[instruction.head](instruction)
    targets, sources = flatten(instruction.operands[:1]), flatten(instruction.operands[1:])
    if len(sources) != len(operation.inputs):
        raise instruction.unsupported(f"{len(sources)} sources, not {len(operation.inputs)}")

    def step(cta: "Cta", active):
        if operation.convergent:
            cta.need_all(active, instruction.head)
        values = [
            cta.read(s, kind, operation.take_undefined)
            for s, kind in zip(sources, operation.inputs, strict=True)
        ]
        if operation.convergent:
            values = [cta.spread(v) for v in values]
        results = operation.function(*values)
        for target, result in zip(
            targets, results if isinstance(results, tuple) else (results,), strict=False
        ):
            cta.write(target, result, active)

    return step


def _barrier(instruction: Instruction):
    return lambda cta, active: cta.need_all(active, instruction.head)


def _nothing(cta: "Cta", active):
    pass


def build(instruction: Instruction):
    """The function that executes an instruction, given the CTA and which threads take part (None: all)."""
    if instruction.opcode in BARRIERS:
        return _barrier(instruction)
    if instruction.opcode in FENCES:
        return _nothing
    if instruction.head in transfer.BUILDERS:
        return transfer.BUILDERS[instruction.head](instruction)
    if instruction.parts and instruction.type not in RAW and instruction.head not in GENERAL:
        raise instruction.unsupported()
    return _compute(instruction)


class Cta:
    """The state of one CTA. A register is an array with one value a thread, of an unsigned type or, for a
    predicate, bool.

    Arrays are never changed in place, so a move may share them.
    """

    def __init__(
        self,
        program: Program,
        params: dict[str, int],
        memory: GlobalMemory,
        shared_bytes: int,
        ctaid: tuple,
        grid: tuple,
    ):
        self.program, self.params, self.memory = program, params, memory
        self.shared = SharedMemory(shared_bytes)
        self.copies = transfer.AsyncCopies(self.shared)
        self.registers: dict[str, np.ndarray] = {}
        self.specials = self._special_registers(ctaid, grid)

    def _special_registers(self, ctaid: tuple, grid: tuple) -> dict[str, np.ndarray]:
        thread = np.arange(self.program.threads, dtype=np.uint32)
        out = {"%laneid": thread % 32, "%warpid": thread // 32}
        for axis, name in enumerate("xyz"):
            out[f"%tid.{name}"] = thread if axis == 0 else thread * 0
            out[f"%ntid.{name}"] = thread * 0 + (self.program.threads if axis == 0 else 1)
            out[f"%ctaid.{name}"] = thread * 0 + ctaid[axis]
            out[f"%nctaid.{name}"] = thread * 0 + grid[axis]
        return out

    def run(self, steps: list, counts: Counter):
        """From the first instruction to a return. `steps` keeps what build() gave, for the next CTA too."""
        position = 0
        for _ in range(STEP_LIMIT):
            if position == len(self.program.instructions):
                return
            instruction = self.program.instructions[position]
            counts[instruction.opcode] += 1
            try:
                position = self._step(position, instruction, steps)
            except (EmulationError, NotImplementedError) as error:
                error.add_note(f"line {instruction.line}: {instruction.text}")
                raise
            if position is None:
                return
        raise EmulationError(f"more than {STEP_LIMIT} instructions in one CTA")

    def _step(self, position: int, instruction: Instruction, steps: list) -> int | None:
        """The next position, None at the end."""
        active = self._active(instruction)
        if instruction.head in ("bra", "ret", "exit"):
            if not self._taken(active, instruction):
                return position + 1
            return self.program.labels[instruction.operands[0].name] if instruction.head == "bra" else None
        if steps[position] is None:
            steps[position] = build(instruction)
        steps[position](self, active)
        return position + 1

    def _active(self, instruction: Instruction) -> np.ndarray | None:
        if instruction.guard is None:
            return None
        register, negated = instruction.guard
        value = self.read(register, "pred")
        active = ~value if negated else value
        return None if active.all() else active

    def _taken(self, active, instruction: Instruction) -> bool:
        if active is not None and active.any():
            raise DivergentBranch(
                f"{instruction.text}: taken by {int(active.sum())} of {self.program.threads} threads"
            )
        return active is None

    def need_all(self, active, what: str):
        """Raise unless every thread takes part."""
        if active is not None:
            raise EmulationError(f"{what} with {int(active.sum())} of {self.program.threads} threads")

    def spread(self, value: np.ndarray) -> np.ndarray:
        """The array with one value a thread, from one that may hold a single value."""
        return value if len(value) == self.program.threads else np.repeat(value, self.program.threads)

    def read(self, operand, kind: str, take_undefined: bool = False) -> np.ndarray:
        """An operand as an array of numpy type RAW[kind], of length one for a constant. A wider register
        gives its low bits."""
        if isinstance(operand, Register):
            value = self.registers.get(operand.name)
            if value is None and not take_undefined:
                raise UndefinedRegister(f"{operand.name} is read before any write")
            return self._typed(self._poison(operand) if value is None else value, operand, kind)
        if isinstance(operand, Immediate):
            return _constant(operand.value, kind)
        if isinstance(operand, Special):
            return self._typed(self.specials[operand.name], operand, kind)
        if isinstance(operand, Symbol) and operand.name == self.program.shared_symbol:
            return _constant(0, kind)
        raise NotImplementedError(f"reading {operand}")

    @staticmethod
    def _typed(value: np.ndarray, operand, kind: str) -> np.ndarray:
        dtype = np.dtype(RAW[kind])
        if (dtype == np.bool_) != (value.dtype == np.bool_) or dtype.itemsize > value.itemsize:
            raise EmulationError(f"{operand.name} is read as {kind}, which does not fit it")
        if dtype.itemsize < value.itemsize:
            value = value.astype(UNSIGNED[8 * dtype.itemsize])
        return value.view(dtype)

    def write(self, target, value: np.ndarray, active):
        """Set a register. A narrower value is extended by its own sign; threads left out keep the old value,
        or poison."""
        if target == Symbol("_"):
            return
        value = self.spread(self._fitted(target, value))
        if active is not None:
            old = self.registers.get(target.name)
            value = np.where(active, value, self._poison(target) if old is None else old)
        self.registers[target.name] = value

    def _poison(self, register: Register) -> np.ndarray:
        """What a register holds that was never written."""
        if register.bits == 1:
            return np.ones(self.program.threads, bool)
        return np.full(self.program.threads * register.bits // 8, POISON, np.uint8).view(
            UNSIGNED[register.bits]
        )

    @staticmethod
    def _fitted(target: Register, value: np.ndarray) -> np.ndarray:
        if (target.bits == 1) != (value.dtype == np.bool_) or 8 * value.itemsize > max(target.bits, 8):
            raise EmulationError(f"a {value.dtype} result does not fit {target.name}")
        if target.bits == 1:
            return value
        unsigned = UNSIGNED[target.bits]
        return (
            np.ascontiguousarray(value).view(unsigned)
            if 8 * value.itemsize == target.bits
            else value.astype(unsigned)
        )

    def addresses(self, address: Address, space: str) -> np.ndarray:
        """Each thread's address, as int64."""
        base = self.read(address.base, "b64" if space == "global" else "b32")
        return self.spread(base).astype(np.int64) + address.offset

    def expand(self, rows: np.ndarray, active) -> np.ndarray:
        """One value a thread from the active threads' values; the others get zero."""
        if active is None:
            return rows
        out = np.zeros((self.program.threads, *rows.shape[1:]), rows.dtype)
        out[active] = rows
        return out
