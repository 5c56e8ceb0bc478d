"""The house stands: rooms on floors, imports that run downwards alone, no circle of files. Imports inside
functions count."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]

# From the ground up. A room may import from the floors below it, not from its neighbours; folders inside a
# room belong to it.
FLOORS = (
    ("kernels/operator",),
    ("kernels", "quant_core/store", "quant_core/families"),
    ("quant_core/layer",),
    ("quant_core/calibration", "quant_core/charts", "quant_core/cluster", "quant_core/formats"),
    ("quant_core/methods",),
    ("quant_core/training",),
    ("quant_core/run",),
    ("quant_core/precision", "quant_core/convert", "quant_core/diffusers_host"),
    ("quant_core/evaluation", "nodes/host"),
    ("quant_core/cli", "nodes"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def sources() -> list[Path]:
    """The pack's files, relative."""
    return [
        Path("__init__.py"),
        *(
            p.relative_to(ROOT)
            for folder in ("kernels", "quant_core", "nodes")
            for p in (ROOT / folder).rglob("*.py")
        ),
    ]


def room_of(file: Path) -> str:
    """The innermost room that the file lies in; the pack's own `__init__.py` is the door of the nodes."""
    return next((str(folder) for folder in file.parents if str(folder) in FLOOR), "nodes")


def imported(file: Path, source: str, files: set[Path]) -> set[Path]:
    """The files of the pack that `file` imports, by its relative imports, wherever in it they stand."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for alias in node.names:
            candidates = (
                base / f"{alias.name}.py",
                base / alias.name / "__init__.py",
                base.with_suffix(".py"),
                base / "__init__.py",
            )
            found |= {next(c for c in candidates if c in files)}
    return found - {file}


def arrows() -> dict[Path, set[Path]]:
    """{file: the files that it imports}."""
    files = set(sources())
    return {file: imported(file, (ROOT / file).read_text(encoding="utf-8"), files) for file in files}


def uphill(graph: dict[Path, set[Path]]) -> list[str]:
    """The imports that do not go down: to a room above, or to a neighbour on the same floor."""
    return [
        f"{file} imports {other}"
        for file, others in graph.items()
        for other in others
        if room_of(file) != room_of(other) and FLOOR[room_of(other)] >= FLOOR[room_of(file)]
    ]


def test_imports_run_downwards():
    assert uphill(arrows()) == []
    assert len(FLOORS) <= 10


def test_every_folder_is_in_a_room_and_every_room_is_there():
    rooms = {room_of(file) for file in sources()}
    assert rooms == set(FLOOR)

    assert {p.name for p in (ROOT / "quant_core").glob("*.py")} == {"__init__.py"}


def test_no_circle_of_files():
    list(TopologicalSorter(arrows()).static_order())


def test_the_search_finds_what_it_is_for():
    files = {
        Path("quant_core/run/a.py"),
        Path("quant_core/layer/b.py"),
        Path("quant_core/layer/__init__.py"),
        Path("kernels/c.py"),
    }
    source = (
        "def f():\n    from ..layer import b\n    from ..layer.b import x as y\n    from ...kernels import "
        "c\nimport torch"
    )
    assert imported(Path("quant_core/run/a.py"), source, files) == {
        Path("quant_core/layer/b.py"),
        Path("kernels/c.py"),
    }
    graph = {
        Path("quant_core/layer/b.py"): {Path("quant_core/run/a.py")},
        Path("quant_core/run/a.py"): {Path("quant_core/layer/b.py")},
    }
    assert uphill(graph) == ["quant_core/layer/b.py imports quant_core/run/a.py"]
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())
