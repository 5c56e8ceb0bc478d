"""The house keeps its measure: the figures of `python -m comfyui_nibble.tests.house` stay within these
limits."""

import runpy
import textwrap

import pytest

from comfyui_nibble.tests import house
from comfyui_nibble.tests.test_floors import FLOORS, arrows, uphill

pytestmark = pytest.mark.quick


def test_floors():
    assert len(FLOORS) <= 10
    assert uphill(arrows()) == []


def test_files_and_functions_are_short():
    lines, file = house.longest_file()
    assert lines <= 400, file
    assert len(house.long_functions()) <= 5, house.long_functions()
    assert house.tokens_a_line() <= 9.55  # 9.5


def test_the_way_of_a_layer_is_short():
    calls, _, _ = house.forward()
    assert 1 < calls <= 80
    _, moves = house.fit()
    assert 1 < moves <= 40


def test_calls_and_moves_are_counted(tmp_path, monkeypatch):
    """Two files: `outer` calls `inner` of the other one twice and `own` once."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "b.py").write_text("def inner():\n    return 1\n")
    (folder / "a.py").write_text(
        textwrap.dedent(
            """
            def own():
                return 2

            def outer(inner):
                return inner() + own() + inner()
            """
        )
    )
    monkeypatch.setattr(house, "PACK", tmp_path)
    found: dict = {}
    for name in "ab":
        found |= runpy.run_path(str(folder / f"{name}.py"))
    assert house.traced(lambda: found["outer"](found["inner"])) == (4, 2)
