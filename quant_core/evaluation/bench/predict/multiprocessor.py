"""A model of one multiprocessor that runs a loop of machine code: cycles an iteration, and what bounds them.

Four schedulers issue one instruction a cycle each, in order within a warp, as its control bits say (`sass`).
Each has a tensor core, FP32, integer and special-function lanes, each busy for some cycles an instruction;
all four share one load/store path of 128 bytes a cycle. Barriers hold the warps of a block together. Not in
the model: bank conflicts, misses of caches and of instructions, the clock under power limits.
"""

import heapq
import re
from collections import defaultdict
from dataclasses import dataclass

from .sass import NO_BOARD, Instruction
from .throughput import Throughput

MEMORY = 300  # cycles from a load or a copy to its data: the L2, with some load
SHARED = 30  # cycles of a load from shared memory, of a shuffle
BARRIER = 12  # cycles from the last warp's arrival on
_NEVER = float("inf")
QUEUE = 16  # cycles of work that may wait in front of the load/store path
_FP32 = ("FFMA", "FMUL", "FADD")
_HALF2 = ("HFMA2", "HMUL2", "HADD2", "HMNMX2")
_SLOW = ("MUFU", "I2F", "F2I", "I2I", "F2F", "FRND", "POPC", "FLO")
_CONTROL = (
    "BAR",
    "DEPBAR",
    "LDGDEPBAR",
    "BRA",
    "NOP",
    "WARPSYNC",
    "WARPGROUP",
    "SYNCS",
    "YIELD",
    "BSSY",
    "BSYNC",
    "EXIT",
    "CALL",
    "RET",
    "R2UR",
    "BREAK",
)
_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)")
_SHAPES = {
    "16864": 16 * 8 * 64,
    "16832": 16 * 8 * 32,
    "16816": 16 * 8 * 16,
    "8832": 8 * 8 * 32,
    "8816": 8 * 8 * 16,
    "1688": 16 * 8 * 8,
}


@dataclass(frozen=True)
class Use:
    """What an instruction takes: a pipe ("tensor", "fma", "alu", "special", "memory", "none"), the cycles
    that it is busy, and the cycles to the result where these are not in the stall."""

    pipe: str
    busy: float
    latency: float = 0


def use_of(instruction: Instruction, card: Throughput) -> Use:
    """The pipe of an instruction of one warp."""
    op, kind = instruction.op, instruction.kind
    if instruction.dead or kind in _CONTROL:
        return Use("none", 0, 12)
    if "MMA" in kind:
        busy = _product(op, card)
        return Use("tensor", busy, busy + 16)
    if kind.startswith(("LD", "ST", "ATOM", "RED", "SHFL")):
        return _memory(op, kind)
    if kind in _FP32:
        return Use("fma", card.fma, 4)
    if kind in _HALF2:  # of two halves each, as fast as FP32 but on sm_75 and sm_80
        return Use("fma", 1, 5)
    if kind.startswith("IMAD"):  # on half of the FP32 lanes, or on lanes of their own
        return Use("fma", max(card.fma, 1 if op.startswith("IMAD.MOV") else 2), 5)
    if kind in _SLOW:
        return Use("special", 8, 24)
    if kind.startswith("U"):
        return Use("uniform", 1, 12)
    return Use("alu", 2, 12)


def products_of(op: str) -> float:
    """Codes that a warp multiplies with this instruction of the tensor cores."""
    if wide := _SHAPE.search(op):  # of a warp group: a quarter for each warp
        rows, columns, depth = map(int, wide.groups())
        return rows * columns * depth / 4
    return _SHAPES[next(part for part in op.split(".") if part.isdigit())]


def _product(op: str, card: Throughput) -> float:
    """Cycles of a tensor core for a warp's share of the product."""
    four, half = ".S4" in op or ".U4" in op, op.startswith(("HMMA", "HGMMA"))
    macs = products_of(op)
    if half:
        rate = card.half / (8e9 * card.clock * card.multiprocessors)
        return macs / rate
    if op.startswith("OMMA"):
        return macs / card.fp4
    return macs / (card.int4 if four else card.int8)


def _memory(op: str, kind: str) -> Use:
    size = next((int(p) for p in op.split(".") if p in ("64", "128")), 32)
    if kind == "LDSM":
        return Use("memory", {"4": 4, "2": 2}.get(op[-1], 1), SHARED)
    if kind in ("LDS", "STS"):
        return Use("memory", size / 32, SHARED)
    if kind == "SHFL":
        return Use("memory", 2, SHARED)
    # A copy's result is waited for by its group, at `DEPBAR`: see `simulate`.
    return Use("memory", size / 32, 12 if kind == "LDGSTS" else MEMORY)


@dataclass(frozen=True)
class Modelled:
    """Of one iteration, all warps of a multiprocessor together. cycles; bounds: what each pipe alone would
    take; tensor: the share of the cycles in which tensor cores multiply integers."""

    cycles: float
    bounds: dict[str, float]
    tensor: float

    @property
    def limit(self) -> str:
        """The pipe without which nothing goes, or "barriers and latency" where none is busy for 80 %."""
        name, most = max(self.bounds.items(), key=lambda item: item[1])
        return name if most >= 0.8 * self.cycles else "barriers and latency"


def modelled(body, card: Throughput, warps: int, blocks: int, iterations: int = 6) -> Modelled:
    """A loop's steady state with `blocks` blocks of `warps` warps on the multiprocessor."""
    bounds = bounds_of(body, card, warps * blocks)
    cycles = simulate(body, card, warps, blocks, iterations)
    return Modelled(cycles, bounds, bounds["tensor"] / cycles)


def bounds_of(body, card: Throughput, warps: int) -> dict[str, float]:
    """Cycles that each pipe of a multiprocessor is busy for an iteration of this many warps."""
    sums: dict[str, float] = defaultdict(float)
    for instruction in body:
        use = use_of(instruction, card)
        sums[use.pipe] += use.busy
    quarter = warps / 4
    return {
        "tensor": sums["tensor"] * quarter,
        "issue": len(body) * quarter,
        "FMA": sums["fma"] * quarter,
        "integer": sums["alu"] * quarter,
        "special": sums["special"] * quarter,
        "load/store": sums["memory"] * warps,
    }


class _Warp:
    """Where one warp is. ready: the cycle from which on it may issue, infinite at a barrier."""

    __slots__ = ("at", "block", "boards", "copies", "gmma", "open", "ready", "rounds")

    def __init__(self, block):
        self.at, self.rounds, self.ready, self.block = 0, 0, 0.0, block
        self.boards = [0.0] * 6  # when each scoreboard is free
        self.copies: list[float] = []  # when each committed group of copies is there
        self.open = 0.0  # of copies not committed yet
        self.gmma: list[float] = []  # when each group of asynchronous products is done


class _Scheduler:
    """A sub-core. last: the warp that issued last, which goes on while it can; else the youngest that can
    does (Huerta et al., "Analyzing Modern NVIDIA GPU Cores", 2025). next: the cycle in which it looks
    again."""

    def __init__(self, warps):
        self.warps, self.last, self.next = warps[::-1], None, 0.0
        self.lanes = dict.fromkeys(("tensor", "fma", "alu", "special", "uniform", "none"), 0.0)


def simulate(body, card: Throughput, warps: int, blocks: int, iterations: int = 6) -> float:
    """Cycles an iteration in the steady state: the mean of `iterations` behind as many for settling.
    A warp that others leave behind counts with what it does, as blocks that end are followed by new ones."""
    return _Run(body, card, warps, blocks, iterations).cycles()


class _Run:
    def __init__(self, body, card, warps, blocks, iterations):
        self.program = [(i, use_of(i, card), _waiting(i)) for i in body]
        crew = [_Warp(n // warps) for n in range(warps * blocks)]
        self.warps, self.crew = warps, len(crew)
        self.settled, self.end = iterations * self.crew, 2 * iterations * self.crew
        self.schedulers = [_Scheduler(crew[n::4]) for n in range(4) if crew[n::4]]
        self.queue = [(0.0, n) for n in range(len(self.schedulers))]
        self.memory = 0.0  # until when the load/store path is busy
        self.marks: list[float] = []  # when a warp ended an iteration
        self.arrived: dict[tuple[int, int, int], list[_Warp]] = {}

    def cycles(self) -> float:
        while len(self.marks) < self.end:
            now, n = heapq.heappop(self.queue)
            scheduler = self.schedulers[n]
            if now == scheduler.next:
                self._look(n, self._turn(scheduler, now))
        return (self.marks[-1] - self.marks[self.settled - 1]) / (self.end - self.settled) * self.crew

    def _look(self, n: int, when: float):
        self.schedulers[n].next = when
        if when < _NEVER:
            heapq.heappush(self.queue, (when, n))

    def _turn(self, scheduler: _Scheduler, now: float) -> float:
        """Issues one instruction if a warp can; the cycle of the next look."""
        chosen, soonest = None, _NEVER
        for warp in (scheduler.last, *scheduler.warps):
            if warp is None or warp.ready > now:
                soonest = min(soonest, _NEVER if warp is None else warp.ready)
                continue
            _, use, waits = self.program[warp.at]
            busy = self.memory - QUEUE if use.pipe == "memory" else scheduler.lanes[use.pipe]
            start = max(waits(warp), busy)
            if start <= now:
                chosen = warp
                break
            soonest = min(soonest, start)
        if chosen is None:
            return soonest
        scheduler.last = chosen
        self._issue(scheduler, chosen, now)
        return now + 1

    def _issue(self, scheduler: _Scheduler, warp: _Warp, now: float):
        instruction, use, _ = self.program[warp.at]
        done = now + use.latency
        if use.pipe == "memory":
            self.memory = max(self.memory, now) + use.busy
            done = self.memory + use.latency
        elif use.pipe != "none":
            scheduler.lanes[use.pipe] = now + use.busy
        _effects(warp, instruction, now, done, self.memory)
        warp.ready = now + max(instruction.stall, 1)
        place = warp.block, warp.rounds, warp.at
        warp.at += 1
        if warp.at == len(self.program):
            warp.at, warp.rounds = 0, warp.rounds + 1
            self.marks.append(now)
        if instruction.kind == "BAR" and not instruction.guard:
            there = self.arrived.setdefault(place, [])
            there.append(warp)
            warp.ready = _NEVER
            if len(there) == self.warps:
                self._release(self.arrived.pop(place), now + BARRIER)

    def _release(self, there, when: float):
        for warp in there:
            warp.ready = when
        for n, scheduler in enumerate(self.schedulers):
            if when < scheduler.next:
                self._look(n, when)


def _waiting(instruction: Instruction):
    """From a warp to the time when the instruction's scoreboards, copies and products are there."""
    waits, kind, numbers = instruction.waits, instruction.kind, re.findall(r"0x([0-9a-f]+)", instruction.args)
    if kind == "DEPBAR" and numbers and "SB" in instruction.args:
        left = int(numbers[-1], 16)

        def copies(warp):
            there = warp.copies[-left - 1] if len(warp.copies) > left else 0.0
            return max(there, *(warp.boards[i] for i in waits), 0.0)

        return copies
    if kind == "WARPGROUP" and "DEPBAR" in instruction.op and numbers:
        left = int(numbers[-1], 16)
        return lambda warp: warp.gmma[-left - 1] if len(warp.gmma) > left else 0.0
    if not waits:
        return lambda warp: 0.0
    if len(waits) == 1:
        (one,) = waits
        return lambda warp: warp.boards[one]
    return lambda warp: max(warp.boards[i] for i in waits)


def _effects(warp: _Warp, instruction: Instruction, now: float, done: float, memory: float):
    """What an instruction leaves behind for the waits of later ones."""
    if instruction.writes != NO_BOARD:
        warp.boards[instruction.writes] = max(warp.boards[instruction.writes], done)
    if instruction.reads != NO_BOARD:
        warp.boards[instruction.reads] = max(warp.boards[instruction.reads], max(now, memory) + 8)
    kind = instruction.kind
    if kind == "LDGSTS":
        warp.open = max(warp.open, memory + MEMORY)
    elif kind == "LDGDEPBAR":
        warp.copies = [*warp.copies[-7:], max(warp.open, now)]
        warp.open = 0.0
    elif kind in ("IGMMA", "HGMMA") and "gsb0" in instruction.args:
        warp.gmma = [*warp.gmma[-7:], done]
