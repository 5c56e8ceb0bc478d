"""The example workflows opened in the real frontend of a ComfyUI that has no models, in both node styles,
as a newcomer sees them: readable at once, nothing on top of another, every missing file with its download.

$NIBBLE_SCREENSHOTS: a folder where the pictures of what was opened are kept.
"""

import os
import shutil
from itertools import combinations
from pathlib import Path

import pytest

from comfyui_nibble.tests.host import conftest
from comfyui_nibble.tests.host.browser import Hand, opened
from comfyui_nibble.tests.host.server import Server
from comfyui_nibble.tests.host.templates.blueprint import NAME
from comfyui_nibble.tests.host.templates.kinds import kinds, measured
from comfyui_nibble.tests.host.workflow_graphs import NAMES, title, twin, workflow

WIDTH, HEIGHT = 1920, 1080
READABLE = 0.6  # below, ComfyUI draws no text
STYLES = {"classic": False, "vue": True}

# What ComfyUI's list of templates does with a click.
OPEN = """async ([graph, name]) => {
    await app.loadGraphData(graph, true, true, name, {openSource: "template"});
    await new Promise(done => setTimeout(done, 1200));
    const {scale, offset} = app.canvas.ds;
    const vue = document.querySelector("[data-node-id]") !== null;
    const box = n => {
        if (vue) {
            const drawn = document.querySelector(`[data-node-id="${n.id}"]`);
            const {x, y, width, height} = drawn.getBoundingClientRect();
            return [x, y, width, height];
        }
        const [x, y, width, height] = n.getBounding();
        return [(x + offset[0]) * scale, (y + offset[1]) * scale, width * scale, height * scale];
    };
    return {
        vue, scale,
        boxes: app.graph.nodes.map(n => [n.type, ...box(n)]),
        unknown: app.graph.nodes.filter(n => !(n.type in LiteGraph.registered_node_types)).map(n => n.type),
        dialogs: [...document.querySelectorAll("[role=dialog]")].map(d => d.innerText),
        output: (await app.graphToPrompt()).output,
    };
}"""
DOWNLOADS = (
    """() => [...document.querySelectorAll('[data-testid=missing-model-download]')].map(b => b.ariaLabel)"""
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A ComfyUI without any model; with the picture that comes with ComfyUI."""
    folder = tmp_path_factory.mktemp("no_models")
    started = Server(conftest.COMFYUI, folder)
    shutil.copy(conftest.COMFYUI / "input" / "example.png", folder / "input")
    with started:
        yield started


@pytest.fixture(scope="module", params=STYLES)
def page(request, bare):
    settings = {"Comfy.VueNodes.Enabled": STYLES[request.param], "Comfy.RightSidePanel.IsOpen": False}
    with opened(bare, WIDTH, HEIGHT, settings) as page:
        page.style = request.param
        yield page


def keep(page, name):
    """The picture of the page, where somebody asked for it."""
    if folder := os.environ.get("NIBBLE_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name} ({page.style}).png")


def overlapping(boxes):
    """The pairs of nodes that lie on one another by more than half a pixel."""
    inside = lambda a, b: a[1] < b[1] + b[3] - 0.5 and a[2] < b[2] + b[4] - 0.5
    return [(a[0], b[0]) for a, b in combinations(boxes, 2) if inside(a, b) and inside(b, a)]


def test_overlapping_finds_what_lies_on_another():
    assert overlapping([["A", 0, 0, 10, 10], ["B", 9, 9, 5, 5], ["C", 10, 0, 5, 9]]) == [("A", "B")]


@pytest.mark.parametrize("name", NAMES)
def test_opens_readable(page, name):
    found = page.evaluate(OPEN, [workflow(name), title(name)])
    keep(page, title(name))
    assert found["vue"] == STYLES[page.style]
    assert found["scale"] >= READABLE
    assert overlapping(found["boxes"]) == []
    for kind, x, y, width, height in found["boxes"]:
        assert min(x, y) >= 0, kind
        assert (x + width <= WIDTH, y + height <= HEIGHT) == (True, True), kind
    assert found["unknown"] == []
    assert found["dialogs"] == []
    assert found["output"] == twin(name)
    assert page.errors == []


@pytest.mark.parametrize("name", ["flux_one_node", "flux_nunchaku", "edit_one_node"])
def test_every_missing_file_can_be_downloaded(page, name):
    """In the panel of errors, which has nothing else. The files of the others are held by a test beside."""
    page.evaluate(OPEN, [workflow(name), title(name)])
    asked = {m["name"] for n in workflow(name)["nodes"] for m in n["properties"].get("models", [])}
    page.get_by_role("button", name="View details").click()
    page.wait_for_function(f"() => ({DOWNLOADS})().length >= {len(asked)}", timeout=10_000)
    keep(page, f"{title(name)}, missing files")
    assert sorted(page.evaluate(DOWNLOADS)) == sorted(f"Download {file}" for file in asked)
    page.evaluate("app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', false)")
    told = page.evaluate("document.body.innerText")
    assert "Missing Node" not in told
    assert "Missing Inputs" not in told


def test_kinds_are_what_the_frontend_makes_of_them(page):
    """Else `python -m comfyui_nibble.tests.host.templates.kinds` writes the table anew."""
    table = kinds()
    found = measured(page, table)
    for kind, entry in table.items():
        facts = {key: found[kind][key] for key in ("title", "inputs", "types", "outputs")}
        assert facts == {key: entry[key] for key in facts}, kind
        assert [name for name, _ in found[kind]["widgets"]] == [name for name, _ in entry["widgets"]], kind


def test_blueprint_is_listed_and_can_be_added(page, bare):
    """By a double click on the canvas, its name and Enter, as any node."""
    entries = bare.get("/global_subgraphs").values()
    assert [e["info"]["node_pack"] for e in entries if e["name"] == NAME] == ["custom_nodes.ComfyUI-Nibble"]
    page.evaluate("app.graph.clear()")
    page.wait_for_timeout(1000)  # the canvas has nothing left to hit
    Hand(page).add(NAME, 700, 300)
    keep(page, NAME)
    found = page.evaluate(
        """() => app.graph.nodes.map(n => ({
            inputs: n.inputs.map(i => i.name), outputs: n.outputs.map(o => o.name),
            widgets: n.widgets.map(w => w.name), inner: n.subgraph.nodes.map(i => i.type),
        }))"""
    )
    front = ["sampler_name", "scheduler", "steps", "cfg", "samples", "method"]
    assert found == [
        {
            "inputs": ["model", "clip", "latent_image", "negative", *front],
            "outputs": ["model", "report"],
            "widgets": front,
            "inner": ["NibbleCalibrationPrompts", "NibbleCalibrate", "NibbleQuantize"],
        }
    ]
    assert page.errors == []


def test_browse_templates_lists_them_and_opens_one(page, bare):
    assert set(bare.get("/workflow_templates")["ComfyUI-Nibble"]) == {title(name) for name in NAMES}
    page.evaluate("app.graph.clear()")
    page.get_by_role("button", name="Templates").first.click()
    page.get_by_text("ComfyUI-Nibble", exact=True).first.click()
    cards = page.locator("[data-testid^=template-workflow-]")
    cards.first.wait_for()
    page.wait_for_timeout(1500)
    keep(page, "Browse templates")
    assert cards.count() == len(NAMES)
    first = cards.first.locator("img").first
    assert first.evaluate("i => [i.naturalWidth, i.naturalHeight]") == [512, 512]
    cards.filter(has_text=title("flux_one_node")).first.click()
    page.wait_for_function("() => app.graph.nodes.length > 1")
    page.wait_for_timeout(1000)
    assert page.evaluate("app.graph.nodes.length") == len(workflow("flux_one_node")["nodes"])
    assert page.evaluate("app.canvas.ds.scale") >= READABLE
    assert page.errors == []
