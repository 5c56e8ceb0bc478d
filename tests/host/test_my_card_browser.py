"""Nibble Quantize for My Card in ComfyUI's own frontend: by mouse from an empty canvas to a picture, and what
the node shows in both kinds of nodes and palettes."""

import re

import pytest

from comfyui_nibble.tests.host.browser import Hand, opened
from comfyui_nibble.tests.host.graphs import node
from comfyui_nibble.tests.host.test_my_card import card_graph

SAID = "() => [...document.querySelectorAll('.nibble-said')].map(e => e.innerText).join()"
PICTURES = """() => app.graph.nodes.some(n =>
    n.comfyClass === 'NibbleQuantizeForMyCard' && n.imgs?.length === 2
    || app.nodeOutputs?.[n.id]?.images?.length === 2)"""


@pytest.mark.parametrize("style", ["classic", "nodes 2.0"])
def test_from_an_empty_canvas_to_a_picture(server, style):
    with opened(server, 1920, 1080, {"Comfy.VueNodes.Enabled": style != "classic"}) as page:
        page.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
        page.wait_for_timeout(2000)
        hand = Hand(page)
        load = hand.add("Load Diffusion Model", 350, 250)
        text = hand.add("TestCaptionEncoder", 350, 500)
        card = hand.add("Nibble Quantize for My Card", 900, 200)
        hand.drag(load, 0, card, "model")
        hand.drag(text, 0, card, "clip")
        # The list of files opens outside of the page's own elements in one of the styles.
        page.evaluate("id => app.graph.getNodeById(id).widgets[0].value = 'tiny_flux.safetensors'", load)
        hand.actions.append("choose the model")
        hand.run()
        page.wait_for_function(f"{SAID.replace('join()', 'join().length > 0')}", timeout=300_000)
        page.wait_for_function(PICTURES, timeout=60_000)
        said = page.evaluate(SAID)
        assert re.match(r"(Good|Check)\s*(Very close|Close|Mostly close) to the original", said)
        assert "Saved as tiny_flux-balanced-" in said
        assert len(hand.actions) == 7 < 10
        assert page.errors == []


MODES = {
    "classic dark": (1920, 1080, {}),
    "classic light": (1366, 768, {"Comfy.ColorPalette": "light"}),
    "nodes 2.0 dark": (1366, 768, {"Comfy.VueNodes.Enabled": True}),
    "nodes 2.0 light": (1920, 1080, {"Comfy.ColorPalette": "light", "Comfy.VueNodes.Enabled": True}),
}
CONTRAST = """() => {
    const numbers = text => text.match(/[\\d.]+/g).map(Number)
    const light = rgb => {
        const [r, g, b] = rgb.map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b
    }
    const behind = e => {
        for (; e; e = e.parentElement) {
            const found = numbers(getComputedStyle(e).backgroundColor)
            if (found[3] !== 0) return found.slice(0, 3)
        }
    }
    const ratio = e => {
        const own = light(numbers(getComputedStyle(e).color).slice(0, 3))
        const [a, b] = [own, light(behind(e))].sort((x, y) => y - x)
        return (a + 0.05) / (b + 0.05)
    }
    const box = document.querySelector('.nibble-said')
    return [...box.querySelectorAll('div, strong')].map(ratio)
}"""
INSIDE = """() => {
    const node = app.graph.nodes.find(n => n.comfyClass === 'NibbleQuantizeForMyCard')
    const said = document.querySelector('.nibble-said').getBoundingClientRect()
    const [x, y] = app.canvasPosToClientPos(node.pos), scale = app.canvas.ds.scale
    return said.height > 30 && said.left >= x - 1 && said.top >= y - 1
        && said.right <= x + scale * node.size[0] + 1 && said.bottom <= y + scale * node.size[1] + 1
}"""


@pytest.mark.parametrize("mode", MODES)
def test_the_verdict_is_readable_and_lies_in_its_node(server, mode):
    width, height, settings = MODES[mode]
    plain = {"Comfy.ColorPalette": "dark", "Comfy.VueNodes.Enabled": False}
    graph = card_graph(wish="fast", show_before_and_after=True)
    with opened(server, width, height, plain | settings) as page:
        page.evaluate("graph => app.loadApiJson(graph, 'card')", graph)
        page.evaluate("() => app.queuePrompt(0, 1)")
        page.wait_for_selector(".nibble-said", timeout=180_000)
        page.wait_for_timeout(2000)
        said = page.evaluate(SAID)
        assert re.match(r"Check\s*Not measured", said)
        assert min(page.evaluate(CONTRAST)) >= 4.5
        assert page.evaluate(INSIDE)
        widgets = page.evaluate("() => app.graph.nodes.flatMap(n => n.widgets ?? []).map(w => w.name)")
        assert "nibble_said" in widgets
        assert "$$node-text-preview" not in widgets  # the last text under the bar
        assert page.errors == []


@pytest.mark.parametrize("style", ["classic", "nodes 2.0"])
def test_a_long_text_scrolls_in_its_node(server, style):
    """Nibble Inspect says more than a node is high."""
    server.run(card_graph(wish="fast"))
    files = sorted((server.base / "output" / "diffusion_models").glob("tiny_flux-fast-*.safetensors"))
    graph = {"1": node("NibbleInspect", model_name=files[0].name)}
    with opened(server, 1366, 768, {"Comfy.VueNodes.Enabled": style != "classic"}) as page:
        page.evaluate("graph => app.loadApiJson(graph, 'inspect')", graph)
        page.evaluate("() => app.queuePrompt(0, 1)")
        page.wait_for_selector(".nibble-said", timeout=60_000)
        page.wait_for_timeout(2000)
        box = "document.querySelector('.nibble-said')"
        assert page.evaluate(f"() => {box}.scrollHeight > 2 * {box}.clientHeight")
        assert 100 < page.evaluate(f"() => {box}.clientHeight") <= 270
        assert page.evaluate("() => app.graph.nodes[0].size[1]") < 500
