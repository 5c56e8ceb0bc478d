"""Compiles Triton kernels for any card without one, and reads what came out. Runs in processes of its own
(see `pool`).

The tests' process has TRITON_INTERPRET=1, under which nothing is compiled.
"""

import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

from comfyui_nibble.quant_core.evaluation.bench.predict import machine_code


@dataclass(frozen=True)
class Compiled:
    """What the gate checks. `instructions`: tensor-core instructions of the final code and their count.
    `waits`: how many groups of wgmma each wait within an innermost loop of int8 wgmma leaves running.
    """

    text: str
    shared: int
    registers: int
    spills: int
    instructions: dict = field(default_factory=dict)
    serialized: bool = False
    waits: tuple[int, ...] = ()


def compile_kernel(
    module: str, kernel: str, signature: dict, constants: dict, arch, options: dict
) -> Compiled:
    """The arguments are those of `machine_code.built`."""
    built = machine_code.built(module, kernel, signature, constants, arch, options)
    if isinstance(arch, int):
        return _read_cubin(built)
    code = built.asm["amdgcn"]
    number = lambda what: int(re.search(rf"\.{what}:\s*(\d+)", code).group(1))
    return Compiled(
        code,
        built.metadata.shared,
        number("vgpr_count"),
        number("vgpr_spill_count"),
        _count(r"\bv_(?:mfma|wmma)\w*", code),
    )


def _read_cubin(built) -> Compiled:
    binary = machine_code.disassembled(built)
    sass = binary.text
    products = _count(r"\b(?:IMMA|IGMMA|HMMA|HGMMA|QMMA|OMMA|UTC\w*MMA)[\w.]*", sass)
    fences, wgmmas = (
        len(re.findall(r"WARPGROUP\.ARRIVE", sass)),
        sum(n for k, n in products.items() if "GMMA" in k),
    )
    # ptxas puts a fence in front of every single wgmma of a chain it had to serialise.
    serialized = bool(wgmmas) and fences >= wgmmas > 1
    return Compiled(
        built.asm["ptx"],
        binary.shared,
        binary.registers,
        binary.spills,
        products,
        serialized,
        waits_in_loops(sass),
    )


def waits_in_loops(sass: str) -> tuple[int, ...]:
    """`Compiled.waits` of disassembled code. A loop is what lies between a label and a branch back to it,
    unless the kernel ends there: polling a barrier for the second time is moved behind the end and comes back
    from there."""
    lines = sass.splitlines()
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"(\.L_\w+):", line))}
    jumps = [
        (labels.get(m.group(1), i), i)
        for i, line in enumerate(lines)
        if (m := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line))
    ]
    bodies = {(start, end): "\n".join(lines[start:end]) for start, end in jumps if start < end}
    loops = [span for span, body in bodies.items() if "IGMMA" in body and not re.search(r"\bEXIT\b", body)]
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return tuple(
        int(n, 16)
        for span in inner
        for n in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", bodies[span])
    )


def _count(pattern: str, text: str) -> dict:
    found = re.findall(pattern, text)
    return {name: found.count(name) for name in set(found)}


def pool(workers: int = 2) -> ProcessPoolExecutor:
    """Processes in which kernels compile. Submit `compile_kernel`."""
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_compile_for_real)


def _compile_for_real():
    os.environ.pop("TRITON_INTERPRET", None)
