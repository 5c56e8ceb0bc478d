"""What a person meets first, in the real frontend: the search box, the help pages, and both in Chinese."""

import re

import pytest

from comfyui_nibble.tests.host.browser import opened
from comfyui_nibble.tests.host.locales import ENGLISH, FOLDER, read
from comfyui_nibble.tests.host.server import PACK

PAGES = PACK / "nodes" / "web" / "docs"
CHINESE = FOLDER / "zh" / "nodeDefs.json"
LIMIT = 25_000  # bytes of a picture in a help page
LOAD, MY_CARD = "NibbleLoadDiffusionModel", "NibbleQuantizeForMyCard"
# What people type: the node that comes first. ComfyUI ranks by names alone: nodes whose name begins with the
# words, then those that have them, then those with such an alias, the most used ones first.
FOUND = {
    "4bit": MY_CARD,
    "4-bit": MY_CARD,
    "nf4": MY_CARD,
    "compress": MY_CARD,
    "low vram": MY_CARD,
    "load nunchaku": LOAD,
    "load 4bit": LOAD,
    "load 4-bit": LOAD,
    "nunchaku": LOAD,
    "svdquant": "NibbleQuantize",
    "w4a4": "NibbleQuantize",
    "bake lora": "NibbleBakeLora",
    "calibration": "NibbleCalibrationPrompts",
}
# Where nodes of ComfyUI stand in front: one begins with the word, one is much used and has nearly its
# letters.
BEHIND_CORE = {
    "quantize": ("Quantize Image", "Nibble Quantize", "Nibble Quantize for My Card"),
    "vram": ("Load LoRA Model", "Nibble Quantize for My Card"),
}
ADD = """kind => {
    app.graph.clear()
    const node = LiteGraph.createNode(kind)
    node.pos = [700, 250]
    app.graph.add(node)
    app.canvas.ds.scale = 1
    app.canvas.ds.offset = [0, 0]
    app.canvas.selectNode(node)
}"""
# What of a help page is wider than the panel, and pictures that did not load.
MISFITS = """() => {
    const page = document.querySelector(".node-help-content")
    const edge = page.getBoundingClientRect().right + 1
    const wide = [...page.querySelectorAll("table, p, li, img, h1, h2")]
        .filter(e => e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > edge)
        .filter(e => getComputedStyle(e).display !== "inline")
    return wide.map(e => e.tagName + ": " + e.textContent.slice(0, 60))
}"""


@pytest.fixture(autouse=True)
def english_afterwards(request):
    """The server, and with it the settings, belong to all tests."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").post("/settings", {"Comfy.Locale": "en"})


def open_search(page):
    """As a double-click on the canvas does, which a busy machine takes for two clicks."""
    page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.get_by_role("combobox").first.wait_for()


def searched(page, words: str) -> list[str]:
    """Names of the nodes that the search box lists for these words, in its order."""
    page.keyboard.press("Control+A")
    page.keyboard.type(words)
    page.wait_for_timeout(400)
    names = page.evaluate("() => [...document.querySelectorAll('[role=option]')].map(e => e.innerText)")
    return list(dict.fromkeys(name.split("\n")[0] for name in names))


def found(page) -> dict[str, tuple[str, ...]]:
    """What the search box lists first: a node, or as many as BEHIND_CORE has."""
    open_search(page)
    first = {
        words: tuple(searched(page, words)[: len(BEHIND_CORE.get(words, "1"))])
        for words in [*FOUND, *BEHIND_CORE]
    }
    page.keyboard.press("Escape")
    return first


def misfits(page, kind: str, title: str) -> list[str]:
    """What of the help page of a kind of node is wider than its panel; opened by the button on the node, with
    this title and its picture."""
    page.evaluate(ADD, kind)
    button = page.get_by_test_id("info-button")
    button.wait_for()
    if not page.locator(".node-help-content").count():
        button.click()
    page.locator(".node-help-content h1", has_text=re.compile(f"^{re.escape(title)}$")).wait_for()
    page.locator(".node-help-content img").first.wait_for()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.node-help-content img')]"
        ".every(i => i.complete && i.naturalWidth > 0 && i.alt)"
    )
    return page.evaluate(MISFITS)


def test_in_english(server):
    names = {kind: d["display_name"] for kind, d in read(ENGLISH).items()}
    with opened(server, 1600, 950, {"Comfy.Locale": "en"}) as page:
        first = found(page)
        wide = {kind: over for kind, title in names.items() if (over := misfits(page, kind, title))}
        assert (wide, page.errors) == ({}, [])
    assert first == {words: (names[kind],) for words, kind in FOUND.items()} | BEHIND_CORE


def test_in_chinese(server):
    """Titles, inputs, outputs, the help pages that are translated, and the category in the search box."""
    chinese = read(CHINESE)
    with opened(server, 1600, 950, {"Comfy.Locale": "zh"}) as page:
        page.evaluate(ADD, "NibbleExportModel")
        title, inputs, outputs = page.evaluate(
            "() => { const n = app.graph.nodes[0]; const named = s => s.map(i => i.localized_name);"
            "return [n.title, named(n.inputs), named(n.outputs)] }"
        )
        for kind in sorted(p.parent.name for p in PAGES.glob("*/zh.md")):
            assert misfits(page, kind, chinese[kind]["display_name"]) == []
        open_search(page)
        searched(page, title)
        shown = page.locator("[role=option]").first.inner_text()
        assert page.errors == []
    node = chinese["NibbleExportModel"]
    assert title == node["display_name"]
    assert inputs == [i["name"] for i in node["inputs"].values()]
    assert outputs == [o["name"] for o in node["outputs"].values()]
    assert "文件" in shown


@pytest.mark.quick
def test_every_help_page_has_its_picture_and_none_is_heavy():
    pages = [*PAGES.glob("*.md"), *PAGES.glob("*/zh.md")]
    shown = {
        page: re.findall(r"!\[[^\]]+\]\(pictures/([^)]+)\)", page.read_text(encoding="utf-8"))
        for page in pages
    }
    assert all(shown.values()), [page.name for page, found in shown.items() if not found]
    assert {name for found in shown.values() for name in found} == {
        p.name for p in (PAGES / "pictures").iterdir()
    }
    assert {
        p.name: p.stat().st_size for p in (PAGES / "pictures").iterdir() if p.stat().st_size > LIMIT
    } == {}
