"""NVIDIA's machine code as `nvdisasm -c -hex` prints it: instructions with their control bits, and loops.

An instruction has 128 bits. From bit 105 on they say, as the compiler decided: for how many cycles the warp
issues nothing after it (stall, 4 bits), a hint (1), which of six scoreboards is set until its result is there
(3, 7 for none) and until its operands are read (3), and which scoreboards it waits for (6). Results that
always take equally long are waited for by the stall alone, so that no table of latencies is needed for them.
"""

import re
from dataclasses import dataclass, field

NO_BOARD = 7
_LINE = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<op>[A-Z][\w.]*)\s*(?P<args>.*?)\s*;"
    r"\s+/\* 0x(?P<low>[0-9a-f]{16}) \*/"
)
_HIGH = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_PRODUCTS = ("IMMA", "IGMMA", "UTCIMMA", "OMMA")


@dataclass(frozen=True)
class Instruction:
    """op: with its suffixes, "LDG.E.128". guard: "@P0", "@!PT" (never), "". stall: in cycles. writes, reads:
    the scoreboard set until the result is there, and until the operands are read; NO_BOARD for none. waits:
    the scoreboards that must be free first."""

    op: str
    args: str = ""
    guard: str = ""
    stall: int = 1
    writes: int = NO_BOARD
    reads: int = NO_BOARD
    waits: tuple[int, ...] = ()

    @property
    def dead(self) -> bool:
        return self.guard == "@!PT"

    @property
    def kind(self) -> str:
        return self.op.split(".")[0]


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel. loops: (first, behind the last) of each backward branch, inner or
    outer. jumps: {branch: where it goes} of the forward ones."""

    instructions: tuple[Instruction, ...]
    loops: tuple[tuple[int, int], ...]
    jumps: dict[int, int] = field(default_factory=dict)

    def executed(self, span: tuple[int, int]) -> tuple[Instruction, ...]:
        """What runs of a span: the slow path of a division, which only values near the ends of the range
        take, is jumped over. It ends in a call."""
        out, i = [], span[0]
        while i < span[1]:
            out.append(self.instructions[i])
            ahead = self.jumps.get(i, 0)
            called = any(one.kind == "CALL" for one in self.instructions[i + 1 : ahead])
            i = ahead if i < ahead <= span[1] and called else i + 1
        return tuple(out)


def parse(text: str) -> Code:
    """The kernel in a disassembly with control bits."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    pending = None
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif one := _LINE.search(line):
            pending = one
        elif pending is not None and (high := _HIGH.match(line)):
            found.append(_instruction(pending, int(high[1], 16)))
            pending = None
    loops = []
    jumps = {}
    for i, instruction in enumerate(found):
        target = _TARGET.search(instruction.args) if instruction.kind == "BRA" else None
        start = labels.get(target[1]) if target else None
        if start is not None and start < i:  # a branch to itself ends the text of every kernel
            loops.append((start, i + 1))
        elif start is not None and start > i:
            jumps[i] = start
    return Code(tuple(found), tuple(loops), jumps)


def _instruction(match, high: int) -> Instruction:
    bits = high >> 41
    waits = tuple(i for i in range(6) if bits >> 11 >> i & 1)
    guard = (match["guard"] or "").strip()
    return Instruction(match["op"], match["args"], guard, bits & 15, bits >> 5 & 7, bits >> 8 & 7, waits)


def products(body) -> int:
    """How many products of codes by the tensor cores are in these instructions."""
    return sum(i.kind in _PRODUCTS for i in body)


def inner_loops(code: Code) -> list[tuple[int, int]]:
    """Loops without loops in them, those with the most products of codes first, then the longest. One that
    contains the kernel's end is none: polling a barrier a second time is moved behind it."""
    bodies = {span: code.instructions[slice(*span)] for span in code.loops}
    spans = [span for span, body in bodies.items() if not any(i.kind == "EXIT" and not i.guard for i in body)]
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return sorted(inner, key=lambda s: (products(bodies[s]), s[1] - s[0]), reverse=True)
