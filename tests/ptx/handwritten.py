"""Small PTX kernels around a few instructions, for the emulator's own tests."""

import numpy as np

from comfyui_nibble.tests.ptx.emulator import run

SHARED_BYTES = 4096

_KERNEL = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 buffer[];
.visible .entry test(%(params)s)
.reqntid %(threads)d
{
    .reg .pred %%p<8>;
    .reg .b16 %%h<8>;
    .reg .b32 %%r<16>;
    .reg .b64 %%d<32>;
%(body)s
    ret;
}
"""


def kernel(body: str, params=(), threads: int = 32) -> str:
    """A kernel with registers %p, %h (16 bits), %r (32 bits) and %d (64 bits). `params` are pairs of type and
    name."""
    return _KERNEL % {
        "params": ", ".join(f".param .{kind} {name}" for kind, name in params),
        "threads": threads,
        "body": body,
    }


def _bits(array: np.ndarray) -> int:
    return 8 * array.itemsize


def _column(array: np.ndarray, name: str, pointer: str, move: str) -> str:
    """Loads or stores each thread's row of `array`: element j from or to register `name`j."""
    lines = [f"mad.wide.u32 %d31, %r15, {array.itemsize * array.shape[1]}, {pointer};"]
    for j in range(array.shape[1]):
        place, register = f"[%d31+{j * array.itemsize}]", f"{name}{j}"
        operands = f"{register}, {place}" if move == "ld" else f"{place}, {register}"
        lines.append(f"{move}.global.b{_bits(array)} {operands};")
    return "\n".join(lines)


def compute(code: str, *sources: np.ndarray, results: int = 1, dtype=np.uint32) -> np.ndarray:
    """What each thread computes. Source i, (threads,) or (threads, n), is in registers %a, %b, %c ... with
    numbers from 0.

    The code leaves the results in %y0, %y1 ...; they come back as (threads, results), or (threads,) for a
    single one.
    """
    sources = [np.ascontiguousarray(s).reshape(len(s), -1) for s in sources]
    out = np.zeros((len(sources[0]), results), dtype)
    names = [f"%{'abcefg'[i]}" for i in range(len(sources))]
    lines = [f".reg .b{_bits(s)} {n}<{s.shape[1]}>;" for s, n in zip(sources, names, strict=True)]
    lines += [f".reg .b{_bits(out)} %y<{results}>;", "mov.u32 %r15, %tid.x;"]
    for i, (source, name) in enumerate(zip(sources, names, strict=True)):
        lines += [f"ld.param.u64 %d{i}, [p{i}];", _column(source, name, f"%d{i}", "ld")]
    lines += [code, "ld.param.u64 %d30, [out];", _column(out, "%y", "%d30", "st")]
    params = [*(("u64", f"p{i}") for i in range(len(sources))), ("u64", "out")]
    run(kernel("\n".join(lines), params, len(out)), (1,), [*sources, out], SHARED_BYTES)
    return out[:, 0] if results == 1 else out
