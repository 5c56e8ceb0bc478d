"""Names and tooltips: the English file is what the nodes say, the Chinese one has every key of it, and the
frontend shows them."""

import json
import re

import pytest

from comfyui_nibble.tests.host.locales import ENGLISH, FOLDER, definitions, read

CHINESE = FOLDER / "zh" / "nodeDefs.json"
LIMIT = 200  # letters of a tooltip: two to four lines beside a node


def leaves(content, where=()) -> dict[tuple, str]:
    """{path of keys: text}"""
    if not isinstance(content, dict):
        return {where: content}
    return {k: v for key, part in content.items() for k, v in leaves(part, (*where, key)).items()}


def test_english_is_what_the_nodes_say(comfy):
    assert read(ENGLISH) == definitions(), "python -m comfyui_nibble.tests.host.locales writes it anew"


@pytest.mark.quick
def test_chinese_has_the_same_keys():
    english, chinese = leaves(read(ENGLISH)), leaves(read(CHINESE))
    assert list(chinese) == list(english)
    said = [v for k, v in chinese.items() if k[-1] != "name"]
    assert all(re.search(r"[\u4e00-\u9fff]", text) for text in said)


@pytest.mark.quick
@pytest.mark.parametrize("path", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_every_tooltip_is_there_and_short(path):
    """What is longer stands in the help pages. The frontend reads {, }, @ and | as its own signs."""
    for where, text in leaves(read(path)).items():
        assert text, where
        assert len(text) <= LIMIT, where
        assert not set("{}@|") & set(text), where


@pytest.mark.quick
def test_only_files_that_comfyui_reads():
    assert sorted(str(p.relative_to(FOLDER)) for p in FOLDER.rglob("*.json")) == [
        "en/nodeDefs.json",
        "zh/main.json",
        "zh/nodeDefs.json",
    ]
    assert all(isinstance(json.loads(p.read_text("utf-8")), dict) for p in FOLDER.rglob("*.json"))
