"""Native INT4 tensor cores from `tl.dot`, on sm_80, sm_86 and sm_89.

Triton has no 4-bit type, but the registers of an s8 `m16n8k32` fragment and of an s4 `m16n8k64` fragment hold
the same bytes of the same rows in the same lanes (PTX ISA, "Matrix fragments for mma.m16n8k32 / m16n8k64 with
integer types"): 4 bytes a register, the second half of the registers one half row further on. The order of
channels within a row cancels in the product as both operands are packed alike. So a kernel may `tl.dot`
packed bytes as if they were int8, and this hook into the compiler's stages rewrites the instruction in its
PTX.

Kernels opt in by the end of their name. In Triton 3.6 the hook is no part of the compilation cache's key; a
kernel under such a name must never be compiled without the hook, so the modules that define one import this
one.
"""

import hashlib
from pathlib import Path

from triton import knobs

INT8 = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"
REWRITES = {
    "_s4s4": "mma.sync.aligned.m16n8k64.row.col.satfinite.s32.s4.s4.s32",
    "_u4s4": "mma.sync.aligned.m16n8k64.row.col.satfinite.s32.u4.s4.s32",
}


class NoInt4Error(RuntimeError):
    """Triton's PTX of a native INT4 kernel has no int8 instruction to rewrite."""


def rewrite(ptx: str, name: str) -> str:
    """The PTX of kernel `name` with its int8 products turned into 4-bit ones; other kernels' PTX as it is.

    Raises NoInt4Error where the instruction is not found: running such a kernel would give wrong pictures.
    """
    for ending, instruction in REWRITES.items():
        if name.endswith(ending):
            if INT8 not in ptx:
                raise NoInt4Error(f"{name}: expected {INT8} in the PTX of this Triton, found none")
            return ptx.replace(INT8, instruction)
    return ptx


def _key():
    text = Path(__file__).read_text()
    return text, hashlib.sha256(text.encode()).hexdigest()


def _chained(previous):
    def hook(*args, **kwargs):
        # Triton 3.9 calls without arguments for the hook's part of the cache key.
        if not args and not kwargs:
            key, digest = _key()
            if previous is None:
                return key, digest
            other_key, other = previous()
            return key + other_key, hashlib.sha256((digest + other).encode()).hexdigest()
        if previous is not None:
            previous(*args, **kwargs)
        return _wrap(*args, **kwargs)

    hook.nibble_int4 = True
    return hook


def _wrap(backend, stages, options, language, capability):
    if "ptx" not in stages:
        return
    make_ptx = stages["ptx"]
    stages["ptx"] = lambda source, metadata: rewrite(make_ptx(source, metadata), metadata["name"])


def install():
    """Puts the hook in front of whatever hook is there. Again and again has no further effect, nor before
    Triton 3.6, which has none."""
    if not hasattr(knobs.runtime, "add_stages_inspection_hook"):
        return
    current = knobs.runtime.add_stages_inspection_hook
    if not getattr(current, "nibble_int4", False):
        knobs.runtime.add_stages_inspection_hook = _chained(current)


install()
