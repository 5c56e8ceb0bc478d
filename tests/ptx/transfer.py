"""Instructions that touch memory: ld, st, cp.async and ldmatrix."""

from typing import NamedTuple

import numpy as np

from comfyui_nibble.tests.ptx.errors import EmulationError
from comfyui_nibble.tests.ptx.formats import INTEGERS, RAW
from comfyui_nibble.tests.ptx.memory import SharedMemory
from comfyui_nibble.tests.ptx.parser import Instruction, flatten
from comfyui_nibble.tests.ptx.warp import WARP

# Caching, ordering and scope change nothing where one CTA runs at a time.
_CACHING = {
    "nc",
    "ca",
    "cg",
    "cs",
    "cv",
    "lu",
    "wb",
    "wt",
    "volatile",
    "weak",
    "relaxed",
    "acquire",
    "release",
    "cta",
    "gpu",
    "sys",
}
_SPACES = {"param": "param", "global": "global", "shared": "shared", "shared::cta": "shared"}


class _Access(NamedTuple):
    """What a load or store's opcode says: `dtype` of one element and how many make the vector."""

    space: str
    count: int
    dtype: np.dtype

    @property
    def size(self) -> int:
        return self.count * self.dtype.itemsize


def _caching(part: str) -> bool:
    return part in _CACHING or part.startswith(("L1::", "L2::"))


def _access(instruction: Instruction) -> _Access:
    others = [p for p in instruction.parts[:-1] if not _caching(p)]
    spaces = [_SPACES[p] for p in others if p in _SPACES]
    counts = [int(p[1:]) for p in others if p in ("v2", "v4")]
    if (
        len(spaces) != 1
        or len(spaces) + len(counts) != len(others)
        or instruction.type not in RAW
        or instruction.type == "pred"
    ):
        raise instruction.unsupported()
    return _Access(spaces[0], counts[0] if counts else 1, np.dtype(RAW[instruction.type]))


def _chosen(values: np.ndarray, active) -> np.ndarray:
    return values if active is None else values[active]


def _memory(cta, space: str):
    return cta.memory if space == "global" else cta.shared


def _load(instruction: Instruction):
    access = _access(instruction)
    if access.space == "param":
        return _load_param(instruction, access)
    # A cache policy may follow the address.
    target, address = instruction.operands[:2]
    targets = flatten((target,))

    def step(cta, active):
        addresses = _chosen(cta.addresses(address, access.space), active)
        values = _memory(cta, access.space).load(addresses, access.size).view(access.dtype)
        for i, register in enumerate(targets):
            cta.write(register, cta.expand(values[:, i], active), active)

    return step


def _load_param(instruction: Instruction, access: _Access):
    target, address = instruction.operands
    if access.count != 1 or address.offset:
        raise instruction.unsupported()

    def step(cta, active):
        bits = cta.params[address.base.name] & (1 << 8 * access.size) - 1
        value = np.array([bits], f"u{access.size}").view(access.dtype)
        cta.write(flatten((target,))[0], value, active)

    return step


def _store(instruction: Instruction):
    access = _access(instruction)
    if access.space == "param":
        raise instruction.unsupported()
    address, source = instruction.operands[:2]
    sources = flatten((source,))

    def step(cta, active):
        values = np.stack([cta.spread(cta.read(s, instruction.type)) for s in sources], 1)
        addresses = _chosen(cta.addresses(address, access.space), active)
        _memory(cta, access.space).store(addresses, _chosen(values, active).view(np.uint8))

    return step


class AsyncCopies:
    """The cp.async of one CTA that have not landed.

    A copy lands only when it is waited for: the latest moment that the ISA allows, so that code which reads
    too early gets what shared memory held before.
    """

    def __init__(self, shared: SharedMemory):
        self.shared = shared
        self.open: list[tuple[np.ndarray, np.ndarray]] = []
        self.groups: list[list[tuple[np.ndarray, np.ndarray]]] = []

    def start(self, addresses: np.ndarray, data: np.ndarray):
        self.open.append((addresses, data))

    def commit(self):
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending: int):
        """Let all but the newest `pending` groups land."""
        done = max(len(self.groups) - pending, 0)
        for group in self.groups[:done]:
            for addresses, data in group:
                self.shared.store(addresses, data)
        self.groups = self.groups[done:]


def _copy(instruction: Instruction):
    """cp.async dst, src, size{, how much of it is read}; the rest of the destination becomes zero."""
    if instruction.opcode == "cp.async.commit_group":
        return _for_all(instruction, lambda copies: copies.commit())
    if instruction.opcode == "cp.async.wait_group":
        return _for_all(instruction, lambda copies: copies.wait(instruction.operands[0].value))
    if instruction.opcode == "cp.async.wait_all":
        return _for_all(instruction, lambda copies: (copies.commit(), copies.wait(0)))
    flags = instruction.modifiers(
        "async", "ca", "cg", "shared", "shared::cta", "global", "L2::128B", "L2::256B", "L2::cache_hint"
    )
    # A cache policy comes last.
    to, source, size, *amount = (
        instruction.operands[:-1] if "L2::cache_hint" in flags else instruction.operands
    )
    if size.value not in ((16,) if "cg" in flags else (4, 8, 16)) or len(amount) > 1:
        raise instruction.unsupported()
    return _start_copy(to, source, size.value, amount[0] if amount else size)


def _for_all(instruction: Instruction, action):
    def step(cta, active):
        cta.need_all(active, instruction.opcode)
        action(cta.copies)

    return step


def _start_copy(to, source, size: int, amount):
    def step(cta, active):
        into = _chosen(cta.addresses(to, "shared"), active)
        out_of = _chosen(cta.addresses(source, "global"), active)
        amounts = _chosen(cta.spread(cta.read(amount, "u32")), active)
        if (amounts > size).any():
            raise EmulationError(f"cp.async reads {int(amounts.max())} bytes for {size}")
        cta.shared.check(into, size, size, "cp.async")
        data = np.zeros((len(into), size), np.uint8)
        for n in np.unique(amounts[amounts > 0]):
            lanes = amounts == n
            data[lanes, :n] = cta.memory.load(out_of[lanes], int(n), alignment=size)
        cta.copies.start(into, data)

    return step


def _load_matrices(instruction: Instruction):
    """ldmatrix: 8x8 matrices of 16-bit elements from rows of 16 bytes.

    After the PTX ISA, section "Warp-level matrix load instruction: ldmatrix": lane 8 j + i gives the address
    of row i of matrix j; lane l receives from each matrix elements 2 (l % 4) and the next of row l / 4, or of
    that column with .trans.
    """
    counts = {"x1": 1, "x2": 2, "x4": 4}
    flags = instruction.modifiers(
        "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta"
    )
    found = [counts[f] for f in flags if f in counts]
    targets = flatten(instruction.operands[:1])
    if instruction.type != "b16" or "m8n8" not in flags or len(found) != 1 or len(targets) != found[0]:
        raise instruction.unsupported()

    def step(cta, active):
        cta.need_all(active, "ldmatrix")
        addresses = cta.addresses(instruction.operands[1], "shared").reshape(-1, WARP)
        for j, target in enumerate(targets):
            rows = addresses[:, 8 * j : 8 * j + 8].reshape(-1)
            matrices = cta.shared.load(rows, 16).view(np.uint16).reshape(-1, 8, 8)
            if "trans" in flags:
                matrices = matrices.transpose(0, 2, 1)
            cta.write(target, np.ascontiguousarray(matrices).view(np.uint32).reshape(-1), active)

    return step


def _cache_policy(instruction: Instruction):
    """createpolicy makes an opaque hint."""
    return lambda cta, active: cta.write(instruction.operands[0], np.zeros(1, INTEGERS["b64"]), active)


BUILDERS = {"ld": _load, "st": _store, "cp": _copy, "ldmatrix": _load_matrices, "createpolicy": _cache_policy}
