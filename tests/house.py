"""What the house is like, in figures: `python -m comfyui_nibble.tests.house` prints them, tests/test_house.py
holds them.

Floors, arrows and circles are those of `test_floors`. A code line is one with a token that is neither a
comment nor part of a docstring. A call is one of a Python function of the pack, a move one such call from one
file into another.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path

import torch

import comfyui_nibble
from comfyui_nibble.kernels.dispatch import quant_linear
from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.kernels.target import interpreter
from comfyui_nibble.quant_core.evaluation.bench.host_cost import launches_left_out, microseconds
from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.run.layers import quantize_layers
from comfyui_nibble.quant_core.run.source import Tensors
from comfyui_nibble.tests.test_floors import FLOORS, ROOT, arrows, room_of, sources, uphill

PACK = Path(comfyui_nibble.__file__).parent  # as imported, which may be by a link
BLANK = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.COMMENT,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def longest_file() -> tuple[int, Path]:
    """(lines, file)."""
    return max((len((ROOT / file).read_text(encoding="utf-8").splitlines()), file) for file in sources())


def long_functions(limit: int = 60) -> list[str]:
    """Functions of more than `limit` lines, decorators left out, as "file:name lines"."""
    found = []
    for file in sources():
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                found += [f"{file}:{node.name} {lines}"] if lines > limit else []
    return found


def tokens_a_line() -> float:
    """The mean over the pack's code lines."""
    tokens = lines = 0
    for file in sources():
        source = (ROOT / file).read_text(encoding="utf-8")
        docs = {
            line
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
            for line in range(node.lineno, node.end_lineno + 1)
        }
        read = io.StringIO(source).readline
        kept = [t for t in tokenize.generate_tokens(read) if t.type not in BLANK and t.start[0] not in docs]
        tokens += len(kept)
        lines += len({t.start[0] for t in kept})
    return tokens / lines


def traced(run: Callable[[], object], inside: Callable[[], object] | None = None) -> tuple[int, int]:
    """(calls of the pack's Python functions, moves between its files) while `run` runs; `inside()` says that
    it is not to be counted."""
    folders = [f"{PACK / folder}/" for folder in ("kernels", "quant_core", "nodes")]
    calls = moves = 0
    where: list[str] = []

    def watch(frame, event, _):
        nonlocal calls, moves
        file = frame.f_code.co_filename
        if (
            event not in ("call", "return")
            or not any(file.startswith(f) for f in folders)
            or (inside and inside())
        ):
            return
        if event == "call":
            calls += 1
            moves += bool(where) and where[-1] != file
            where.append(file)
        elif where:
            where.pop()

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls, moves


def forward() -> tuple[int, int, float]:
    """`traced` of a layer's second forward on the launch path, all that is in front of Triton's kernels, and
    its least microseconds, allocations included: SVDQuant's W4A4 layer."""
    part = PartSpec(0, 256, WeightSpec(), ActivationSpec(), smooth=True, rank=16)
    spec = LinearSpec(256, 64, (part,), True)
    g = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(-128, 128, shape, dtype=torch.int8, generator=g)
        if name == "weight"
        else torch.rand(shape, generator=g).bfloat16()
        for name, shape in spec.shapes().items()
    }
    x = torch.randn(32, 256, generator=g).bfloat16()
    with launches_left_out():
        run = lambda: quant_linear(x, spec, tensors, target=interpreter())
        run()
        return *traced(run), microseconds(run)


def fit() -> tuple[int, int]:
    """`traced` of one layer's way from its weight to a quantized layer with its row of the report, rounded to
    nearest."""
    shapes = {"double_blocks.0.img_mlp.0.weight": (128, 64), "double_blocks.0.img_mlp.0.bias": (128,)}
    layer = next(layer for layer in FLUX.mapped(shapes) if layer.name == "double_blocks.0.img_mlp.0")
    state = {
        key: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for key, shape in shapes.items()
    }
    method = METHODS["svdquant"]
    run = lambda: list(quantize_layers([layer], Tensors(state), method, method.configured()))
    run()
    return traced(run)


def figures() -> dict[str, object]:
    graph = arrows()
    rooms = {
        (room_of(a), room_of(b)) for a, others in graph.items() for b in others if room_of(a) != room_of(b)
    }
    (lines, file), long = longest_file(), long_functions()
    calls, _, microseconds = forward()
    return {
        "floors": len(FLOORS),
        "rooms": len({room_of(f) for f in sources()}),
        "arrows between rooms": len(rooms),
        "uphill": len(uphill(graph)),
        "longest file": f"{lines} lines, {file}",
        "functions over 60 lines": f"{len(long)}" + "".join(f"\n    {text}" for text in long),
        "tokens a code line": f"{tokens_a_line():.1f}",
        "Python calls of a layer's forward": calls,
        "microseconds of it, without the kernels": f"{microseconds:.0f}",
        "moves of a layer's weight between files": fit()[1],
    }


if __name__ == "__main__":
    for name, value in figures().items():
        print(f"{name}: {value}")
