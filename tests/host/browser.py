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
