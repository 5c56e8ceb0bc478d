"""What the real frontend makes of each kind of node that a template uses: its inputs, widgets with their
defaults, outputs, and its smallest size in both node styles.

`python -m comfyui_nibble.tests.host.templates.kinds` measures them in Chromium and writes kinds.json anew.
"""

import json
import tempfile
from pathlib import Path

FILE = Path(__file__).with_name("kinds.json")
TITLE_BAR = 30  # of a node, above its position
# Of the UI alone: what the frontend does with a value after a run.
UI_ONLY = {"control_after_generate", "upload"}
# Of the API alone: a view's pictures, which the frontend sends though they are its own.
API_ONLY = {"ImageCompare": {"compare_view": {"__value__": ["", ""]}}}

MEASURE = """async kinds => {
    app.graph.clear();
    const made = kinds.map((kind, i) => {
        const node = LiteGraph.createNode(kind);
        node.pos = [(i % 4) * 500, Math.floor(i / 4) * 700];
        app.graph.add(node);
        node.setSize(node.computeSize());
        return node;
    });
    app.canvas.ds.scale = 1;
    app.canvas.setDirty(true, true);
    await new Promise(done => setTimeout(done, 3000));
    return Object.fromEntries(made.map(node => {
        const drawn = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
        const named = [];
        for (const widget of node.widgets ?? [])
            if (widget.serialize !== false) {
                const name = widget.name == "fixed" ? "control_after_generate" : widget.name;
                named.push([name, widget.name == "upload" ? "image" : widget.value]);
            }
        const slots = node.inputs ?? [];
        return [node.type, {
            title: node.title,
            inputs: slots.filter(s => !s.widget).map(s => [s.name, s.type]),
            widgets: named,
            types: Object.fromEntries(slots.filter(s => s.widget).map(s => [s.name, s.type])),
            outputs: (node.outputs ?? []).map(s => [s.name, s.type]),
            classic: [...node.computeSize()],
            drawn: drawn ? [drawn.width, drawn.height] : null,
        }];
    }));
}"""


def kinds() -> dict:
    """{kind of node: {title, inputs, widgets, types, outputs, size}}; size: without the title bar."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def measured(page, names) -> dict:
    """The entries of `names` as the frontend of `page` makes them, without sizes; and the sizes apart."""
    return page.evaluate(MEASURE, sorted(names))


def larger(classic: dict, vue: dict) -> dict:
    """Both styles' measurements as one table: the larger of the two sizes, rounded up to whole pixels."""
    out = {}
    for kind, found in classic.items():
        (width, height), drawn = found["classic"], vue[kind]["drawn"]
        size = [max(width, drawn[0]), max(height, drawn[1] - TITLE_BAR)]
        facts = {key: found[key] for key in ("title", "inputs", "widgets", "types", "outputs")}
        out[kind] = facts | {"size": [-int(-value // 1) for value in size]}
    return out


def main():
    from comfyui_nibble.tests.host.browser import opened
    from comfyui_nibble.tests.host.server import Server, find_comfyui
    from comfyui_nibble.tests.host.templates.every import TEMPLATES

    used = {"MarkdownNote"} | {node.kind for template in TEMPLATES for node in template.nodes()}
    found = []
    with Server(find_comfyui(), Path(tempfile.mkdtemp())) as server:
        for vue in (False, True):
            with opened(server, settings={"Comfy.VueNodes.Enabled": vue}) as page:
                found.append(measured(page, used))
    FILE.write_text(json.dumps(larger(*found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
