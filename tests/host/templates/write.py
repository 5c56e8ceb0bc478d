"""A template as ComfyUI's two kinds of JSON: the graph for its frontend and the API twin for scripts.

`python -m comfyui_nibble.tests.host.templates.write` writes all of workflows/.
"""

import json
import uuid

from comfyui_nibble.tests.host.server import PACK
from comfyui_nibble.tests.host.templates.describe import Node, Template
from comfyui_nibble.tests.host.templates.every import TEMPLATES
from comfyui_nibble.tests.host.templates.kinds import API_ONLY, UI_ONLY, kinds
from comfyui_nibble.tests.host.templates.layout import place
from comfyui_nibble.tests.host.templates.models import models_of

FOLDER = PACK / "workflows"
NOTE = "MarkdownNote"


def slot_of(source: Node, output: str | None, table: dict) -> int:
    """The number of the output that a wire starts from."""
    names = [name for name, _ in table[source.kind]["outputs"]]
    return 0 if output is None else names.index(output)


def values_of(node: Node, table: dict) -> dict:
    """{widget: value}: the kind's defaults with what the template sets."""
    values = dict(table[node.kind]["widgets"])
    unknown = node.values().keys() - values.keys()
    assert not unknown, f"{node.kind} has no {unknown}: it has {list(values)}"
    values |= {name: "fixed" for name in values if name == "control_after_generate"}
    return values | node.values()


def wires_of(template: Template, table: dict) -> list[tuple]:
    """[(source, slot, target, input's name, type)] in the order of the targets."""
    wires = []
    for target in template.nodes():
        for name, (source, output) in target.wires().items():
            slot = slot_of(source, output, table)
            wires.append((source, slot, target, name, table[source.kind]["outputs"][slot][1]))
    return wires


def inputs_of(node: Node, table: dict, links: dict) -> list[dict]:
    """The slots of a node, those of widgets only where a wire comes in."""
    kind = table[node.kind]
    slots = [{"name": name, "type": type, "link": links.get(name)} for name, type in kind["inputs"]]
    slots += [
        {"name": name, "type": kind["types"][name], "widget": {"name": name}, "link": links[name]}
        for name in links
        if name in kind["types"]
    ]
    assert links.keys() <= {s["name"] for s in slots}, (node.kind, links)
    return slots


def graph_of(template: Template) -> dict:
    """For the frontend. Node 1 is the note."""
    table = kinds()
    placed, wires = place(template, table), wires_of(template, table)
    ids = {node: i for i, node in enumerate(template.nodes(), start=2)}
    links = [
        [i, ids[source], slot, ids[target], None, type]
        for i, (source, slot, target, _, type) in enumerate(wires, start=1)
    ]
    nodes = [note_of(template, placed)]
    for node, number in ids.items():
        coming = {name: i for i, (_, _, to, name, _) in enumerate(wires, start=1) if to is node}
        slots = inputs_of(node, table, coming)
        for name, i in coming.items():
            links[i - 1][4] = next(k for k, s in enumerate(slots) if s["name"] == name)
        values, (x, y, width, height) = values_of(node, table), placed.nodes[node]
        properties = {"Node name for S&R": node.kind}
        if found := models_of(values.values()):
            properties["models"] = found
        nodes.append(
            {"id": number, "type": node.kind, "pos": [x, y], "size": [width, height], "flags": {}}
            | {"order": number - 1, "mode": 0, "inputs": slots, "outputs": outputs_of(node, table, wires)}
            | ({"title": node.title} if node.title else {})
            | {"properties": properties, "widgets_values": list(values.values())}
            | {"widgets_values_named": values}
        )
    groups = [
        {"id": i, "title": g.title, "bounding": list(placed.groups[g]), "color": g.color, "flags": {}}
        for i, g in enumerate(template.groups(), start=1)
    ]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-nibble/{template.key}")), "revision": 0,
        "last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes, "links": links,
        "groups": groups, "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def outputs_of(node: Node, table: dict, wires: list) -> list[dict]:
    """The outputs of a node with the wires that leave them."""
    out = []
    for slot, (name, type) in enumerate(table[node.kind]["outputs"]):
        leaving = [i for i, w in enumerate(wires, start=1) if w[0] is node and w[1] == slot]
        out.append({"name": name, "type": type, "links": leaving or None})
    return out


def note_of(template: Template, placed) -> dict:
    """The note, which says what to do."""
    x, y, width, height = (round(v) for v in placed.note)
    return {
        "id": 1, "type": NOTE, "pos": [x, y], "size": [width, height], "flags": {}, "order": 0, "mode": 0,
        "inputs": [], "outputs": [], "title": "Read me", "properties": {},
        "widgets_values": [template.note], "widgets_values_named": {"text": template.note},
        "color": "#432", "bgcolor": "#653",
    }  # fmt: skip


def twin_of(template: Template) -> dict:
    """The same for ComfyUI's API."""
    table = kinds()
    ids = {node: str(i) for i, node in enumerate(template.nodes(), start=2)}
    out = {}
    for node, number in ids.items():
        values = {k: v for k, v in values_of(node, table).items() if k not in UI_ONLY}
        wires = {k: [ids[n], slot_of(n, output, table)] for k, (n, output) in node.wires().items()}
        sent = API_ONLY.get(node.kind, {})
        shown = {"title": node.title or table[node.kind]["title"]}
        out[number] = {"class_type": node.kind, "inputs": values | sent | wires, "_meta": shown}
    return out


def texts() -> dict:
    """{path below workflows/: text} of every file that the templates make."""
    out = {}
    for template in TEMPLATES:
        for folder, made in (("", graph_of(template)), ("api/", twin_of(template))):
            out[f"{folder}{template.title}.json"] = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
    return out


def main():
    from comfyui_nibble.tests.host.templates import blueprint

    blueprint.FILE.parent.mkdir(exist_ok=True)
    blueprint.FILE.write_text(blueprint.text(), encoding="utf-8")
    for path in [*FOLDER.glob("*.json"), *FOLDER.glob("api/*.json")]:
        path.unlink()
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
