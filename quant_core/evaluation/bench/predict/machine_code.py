"""Compiles a kernel of the pack for a card that need not be here, and disassembles what Triton's own tools
made of it. Nothing compiles in a process with TRITON_INTERPRET=1."""

import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import sass


@dataclass(frozen=True)
class Binary:
    """A compiled kernel. registers: of a thread. spills: registers stored to memory. shared: bytes a block.
    text: the disassembly, with control bits."""

    registers: int
    spills: int
    shared: int
    text: str

    @property
    def code(self) -> sass.Code:
        return sass.parse(self.text)


def built(module: str, kernel: str, signature: dict, constants: dict, arch: int | str, options: dict):
    """Triton's compiled kernel `module`.`kernel`.

    signature: {argument: type}: "i32", "fp32", "bf16*" for a pointer (aligned to 16 bytes, as torch allocates
    them), "i32:16" for a multiple of 16, or a tuple of these. constants: {argument: value}; "tl.float16"
    stands for Triton's. arch: 89, "gfx942".
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = getattr(importlib.import_module(module), kernel)
    if isinstance(arch, int):
        target = GPUTarget("cuda", arch, 32)
    else:
        target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    names = fn.arg_names
    kinds = {n: "constexpr" if n in constants else signature[n] for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if isinstance(kinds[n], str) and kinds[n].endswith((":16", "*"))
    }
    kinds = {n: _triton_type(k) for n, k in kinds.items()}
    constants = {(names.index(n),): _constant(v) for n, v in constants.items()}
    source_class = ASTSource
    if type(fn).__name__ == "GluonJITFunction":
        from triton.experimental.gluon import _runtime

        source_class = _runtime.GluonASTSource
    source = source_class(fn=fn, signature=kinds, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=options)


def _triton_type(kind):
    if not isinstance(kind, str):
        return tuple(map(_triton_type, kind))
    return f"*{kind[:-1]}" if kind.endswith("*") else kind.removesuffix(":16")


def _constant(value):
    import triton.language as tl

    # Triton's dtypes do not survive the way into another process.
    return (
        getattr(tl, value.removeprefix("tl."))
        if isinstance(value, str) and value.startswith("tl.")
        else value
    )


def disassembled(made) -> Binary:
    """What `built` returned for an NVIDIA card."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(made.asm["cubin"])
        f.flush()
        run = lambda *args: subprocess.run([*args, f.name], capture_output=True, text=True, check=True)
        usage = run(tools / "cuobjdump", "-res-usage")
        text = run(tools / "nvdisasm", "-c", "-hex").stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert found is not None, "cuobjdump named no registers"
    registers, stack, local = map(int, found.groups())
    spills = stack + local + len(re.findall(r"\bSTL\b", text))
    return Binary(registers, spills, made.metadata.shared, text)
