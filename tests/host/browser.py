"""ComfyUI's own frontend in headless Chromium, kept off the network."""

import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def opened(server, width: int = 1920, height: int = 1080, settings: dict | None = None):
    """A page with the frontend of a running `Server`, its nodes registered. Errors of the page gather in
    page.errors.

    settings: of ComfyUI, as {"Comfy.ColorPalette": "light", "Comfy.VueNodes.Enabled": True}. Skips without
    playwright or Chromium.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: apt install chromium")
    # Else the list of templates opens over the graph.
    server.post("/settings", {"Comfy.TutorialCompleted": True} | (settings or {}))
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        local = (server.url + "/", "data:", "blob:")
        page.route(
            "**/*", lambda route: route.continue_() if route.request.url.startswith(local) else route.abort()
        )
        page.goto(server.url + "/")
        # KSampler comes with ComfyUI: the pack's own nodes are for the tests to look for.
        page.wait_for_function(
            "() => window.app?.graph && window.LiteGraph?.registered_node_types.KSampler", timeout=120_000
        )
        page.wait_for_timeout(2000)  # the first, empty graph is opened after the nodes are registered
        yield page
        browser.close()


class Hand:
    """A person's mouse and keyboard on a page. actions: what was done, a line each."""

    def __init__(self, page):
        self.page, self.actions = page, []

    def add(self, name, x, y):
        """A node by double click, search, Enter and a click; its id."""
        before = self.page.evaluate("() => app.graph.nodes.map(n => n.id)")
        search = self.page.get_by_placeholder("Add a node")
        for _ in range(3):  # on a busy machine two clicks may come too far apart to be a double one
            self.page.mouse.dblclick(x, y)
            self.page.wait_for_timeout(2000)
            if search.is_visible():
                break
        search.fill(name)
        self.page.wait_for_timeout(1000)
        self.page.keyboard.press("Enter")
        self.page.wait_for_timeout(500)
        self.page.mouse.move(x + 30, y + 30, steps=3)
        self.page.mouse.move(x, y, steps=3)
        self.page.mouse.click(x, y, delay=80)  # until then it hangs on the mouse
        self.page.wait_for_timeout(300)
        (new,) = self.page.evaluate(
            "old => app.graph.nodes.filter(n => !old.includes(n.id)).map(n => n.id)", before
        )
        self.actions.append(f"add {name}")
        return new

    def drag(self, source, output, target, name):
        """A wire from an output to the input of a name."""
        place = """([id, input, slot]) => {
            const node = app.graph.getNodeById(id)
            const at = input ? node.inputs.findIndex(i => i.name === slot) : slot
            const [x, y] = app.canvasPosToClientPos(input ? node.getInputPos(at) : node.getOutputPos(at))
            return [x, y]
        }"""
        start, end = (
            self.page.evaluate(place, [*which]) for which in ((source, 0, output), (target, 1, name))
        )
        self.page.mouse.move(*start)
        self.page.mouse.down()
        self.page.mouse.move(*end, steps=8)
        self.page.mouse.up()
        self.page.wait_for_timeout(300)
        self.actions.append(f"wire to {name}")

    def run(self):
        self.page.get_by_role("button", name="Run", exact=True).first.click()
        self.actions.append("Run")
