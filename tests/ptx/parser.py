"""PTX text into instructions, labels, parameters and the thread count."""

import re
from dataclasses import dataclass

from comfyui_nibble.tests.ptx.errors import EmulationError

WIDTHS = {"pred": 1, **{f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)}}

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{]*)\{")
_THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+(?:\s*,\s*\d+)*)")
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+\d+\s+)?\.\w+\s+([\w$]+)\s*\[")
_PARAM = re.compile(r"\.param\s+\.(\w+)\s(?:.*\s)?([\w$]+)$", re.DOTALL)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_LINE_DIRECTIVE = re.compile(r"^\s*\.(?:loc|file)\b[^\n]*", re.MULTILINE)
# What can begin at a statement's start: a scope's brace, a label, or a statement up to its semicolon. A brace
# within a statement holds a vector operand.
_PIECE = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[\w$%]+):(?!:)|(?P<statement>[^;{}\s][^;]*);)")
_INSTRUCTION = re.compile(r"(?:@(!?)(\S+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_ADDRESS = re.compile(r"([^+\s]+)\s*(?:\+\s*(-?\w+))?")
_FLOAT_BITS = re.compile(r"0[fF]([0-9a-fA-F]{8})")
_INTEGER = re.compile(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?")
_SPECIAL = re.compile(r"%(?:tid|ntid|ctaid|nctaid|laneid|warpid)(?:\.[xyz])?")


@dataclass(frozen=True)
class Register:
    """A register; a predicate has one bit. The name of one declared in an inner scope ends in the scope's
    number."""

    name: str
    bits: int


@dataclass(frozen=True)
class Immediate:
    """A constant; a float's bits."""

    value: int


@dataclass(frozen=True)
class Special:
    """A special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter, a variable, or `_` for a result that is not wanted."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: "Register | Immediate | Symbol | Special"
    offset: int


# A tuple of operands is a vector {a, b} or a pair p|q.
Operand = Register | Immediate | Special | Symbol | Address | tuple


def flatten(operands) -> tuple:
    """The operands with vectors and pairs replaced by their elements."""
    return tuple(e for o in operands for e in (o if isinstance(o, tuple) else (o,)))


@dataclass(frozen=True)
class Instruction:
    """One instruction: `opcode` is the whole dotted name, `guard` the predicate register and whether it is
    negated."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None
    line: int
    text: str

    @property
    def head(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def parts(self) -> tuple[str, ...]:
        """The opcode's modifiers and types."""
        return tuple(self.opcode.split(".")[1:])

    @property
    def type(self) -> str:
        return self.parts[-1] if self.parts else ""

    def unsupported(self, why: str = "") -> NotImplementedError:
        return NotImplementedError(
            f"PTX instruction {self.opcode} (line {self.line}: {self.text}){': ' * bool(why)}{why}"
        )

    def modifiers(self, *allowed: str, types: int = 1) -> set[str]:
        """The parts before the last `types` ones; one that is not in `allowed` raises."""
        found = set(self.parts[: len(self.parts) - types])
        if found - set(allowed):
            raise self.unsupported(f"modifier {sorted(found - set(allowed))[0]}")
        return found


@dataclass(frozen=True)
class Program:
    """One kernel. `labels` gives the index of the instruction that follows each label."""

    name: str
    params: tuple[tuple[str, str], ...]
    threads: int
    shared_symbol: str | None
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


class _Scope:
    """The registers that one pair of braces declares."""

    def __init__(self, number: int):
        self.suffix = f"@{number}" if number else ""
        self.registers: dict[str, int] = {}
        self.families: dict[str, tuple[int, int]] = {}

    def declare(self, directive: str):
        """`.reg .b32 %r<10>, t;`: a name with <n> stands for n registers with numbers from 0."""
        _, kind, names = directive.split(None, 2)
        bits = WIDTHS[kind.removeprefix(".")]
        for name in names.split(","):
            family = re.fullmatch(r"\s*(\S+?)<(\d+)>\s*", name)
            if family:
                self.families[family[1]] = (bits, int(family[2]))
            else:
                self.registers[name.strip()] = bits

    def find(self, name: str) -> Register | None:
        bits = self.registers.get(name)
        numbered = re.fullmatch(r"(.*?)(\d+)", name)
        if bits is None and numbered and numbered[1] in self.families:
            bits, count = self.families[numbered[1]]
            bits = bits if int(numbered[2]) < count else None
        return None if bits is None else Register(name + self.suffix, bits)


class _Body:
    """Reads a kernel's statements, with a stack of scopes for the braces."""

    def __init__(self):
        self.scopes = [_Scope(0)]
        self.opened = 0
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}

    def read(self, text: str, position: int):
        """From just after the kernel's opening brace to its closing one."""
        line, counted = 1, 0
        while self.scopes:
            piece = _PIECE.match(text, position)
            if not piece:
                raise EmulationError(f"line {line}: cannot read {text[position : position + 60].strip()!r}")
            start, position = piece.start(piece.lastgroup), piece.end()
            line, counted = line + text.count("\n", counted, start), start
            if piece["brace"]:
                self._brace(piece["brace"])
            elif piece["label"]:
                self._label(piece["label"])
            else:
                self._statement(piece["statement"], line)

    def _brace(self, brace: str):
        if brace == "{":
            self.opened += 1
            self.scopes.append(_Scope(self.opened))
        else:
            self.scopes.pop()

    def _label(self, name: str):
        if name in self.labels:
            raise EmulationError(f"label {name} stands twice")
        self.labels[name] = len(self.instructions)

    def _statement(self, text: str, line: int):
        if text.startswith(".reg"):
            self.scopes[-1].declare(text)
        if text.startswith("."):
            return
        found = _INSTRUCTION.fullmatch(text.strip())
        if not found:
            raise EmulationError(f"line {line}: cannot read {text!r}")
        negated, guard, opcode, operands = found.groups()
        self.instructions.append(
            Instruction(
                opcode,
                tuple(self._operand(o) for o in _split(operands, ",")),
                (self._register(guard), bool(negated)) if guard else None,
                line,
                " ".join(text.split()),
            )
        )

    def _register(self, name: str) -> Register:
        found = next((r for s in reversed(self.scopes) if (r := s.find(name))), None)
        if found is None:
            raise EmulationError(f"register {name} is not declared")
        return found

    def _operand(self, text: str) -> Operand:
        if text[0] == "{":
            return tuple(self._operand(o) for o in _split(text[1:-1], ","))
        if text[0] == "[":
            base, offset = _ADDRESS.fullmatch(text[1:-1].strip()).groups()
            return Address(self._operand(base), int(offset or "0", 0))
        if "|" in text:
            return tuple(self._operand(o.strip()) for o in text.split("|"))
        return _constant(text) or self._named(text)

    def _named(self, text: str) -> Operand:
        known = next((r for s in reversed(self.scopes) if (r := s.find(text))), None)
        if known:
            return known
        if _SPECIAL.fullmatch(text):
            return Special(text)
        if text.startswith("%"):
            raise EmulationError(f"register {text} is not declared")
        return Symbol(text)


def _constant(text: str) -> Immediate | None:
    bits = _FLOAT_BITS.fullmatch(text)
    if bits:
        return Immediate(int(bits[1], 16))
    integer = _INTEGER.fullmatch(text)
    return Immediate(int(integer[1], 0)) if integer else None


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators that stand outside brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == separator and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [p for p in parts if p]


def _blank(match: re.Match) -> str:
    # The line breaks stay, so that line numbers keep their meaning.
    return " " + "\n" * match[0].count("\n")


def _params(text: str) -> tuple[tuple[str, str], ...]:
    found = [_PARAM.fullmatch(p.strip()) for p in (text or "").split(",") if p.strip()]
    if not all(found):
        raise NotImplementedError(f"parameters {text}")
    return tuple((p[2], p[1]) for p in found)


def _threads(directives: str) -> int:
    found = _THREADS.search(directives)
    if not found:
        raise EmulationError("the kernel does not say how many threads it has (.reqntid or .maxntid)")
    x, *rest = (int(n) for n in found[1].split(","))
    if any(n != 1 for n in rest):
        raise NotImplementedError("a CTA with more than one dimension")
    return x


def parse(ptx: str) -> Program:
    """The first kernel of a PTX text."""
    text = _LINE_DIRECTIVE.sub("", _COMMENT.sub(_blank, ptx))
    entry = _ENTRY.search(text)
    if not entry:
        raise EmulationError("no .entry in the PTX")
    shared = set(_SHARED.findall(text))
    if len(shared) > 1:
        raise NotImplementedError(f"several shared variables: {', '.join(sorted(shared))}")
    body = _Body()
    body.read(text, entry.end())
    return Program(
        entry[1],
        _params(entry[2]),
        _threads(entry[3]),
        next(iter(shared), None),
        tuple(body.instructions),
        body.labels,
    )
