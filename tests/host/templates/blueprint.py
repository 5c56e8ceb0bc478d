"""The subgraph that ComfyUI lists under Subgraph Blueprints: calibrate and quantize as one node, with the
settings that depend on the model in front."""

import json
import uuid

from comfyui_nibble.tests.host.server import PACK
from comfyui_nibble.tests.host.templates.describe import node
from comfyui_nibble.tests.host.templates.kinds import kinds
from comfyui_nibble.tests.host.templates.write import inputs_of, values_of

NAME = "Nibble - Calibrate and quantize"
FILE = PACK / "subgraphs" / f"{NAME}.json"
DESCRIPTION = (
    "Calibrates a model on prompts and quantizes it to 4 bit. Set sampler, steps and cfg as you sample the "
    "model; negative is for models that are sampled with a cfg above 1."
)
OUTSIDE, RESULT = -10, -20  # what LiteGraph calls the two ends of a subgraph


def named(*parts) -> str:
    """A stable id."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("comfyui-nibble", NAME, *parts))))


def made() -> dict:
    """The blueprint as ComfyUI reads it."""
    table = kinds()
    prompts, calibrate, quantize = (
        node(kind) for kind in ("NibbleCalibrationPrompts", "NibbleCalibrate", "NibbleQuantize")
    )
    inner = {1: prompts, 2: calibrate, 3: quantize}
    # (origin, slot, target, input's name, type)
    wires = [
        (OUTSIDE, 0, 2, "model", "MODEL"),
        (OUTSIDE, 0, 3, "model", "MODEL"),
        (OUTSIDE, 1, 1, "clip", "CLIP"),
        (OUTSIDE, 2, 2, "latent_image", "LATENT"),
        (OUTSIDE, 3, 2, "negative", "CONDITIONING"),
        (1, 0, 2, "conditioning.positive0", "CONDITIONING"),
        (2, 0, 3, "calibration", "NIBBLE_CALIBRATION"),
    ]
    ends = [(3, 0, "model", "MODEL"), (3, 1, "report", "STRING")]
    nodes, links, x = [], [], 0
    for number, n in inner.items():
        coming = {name: i for i, (_, _, to, name, _) in enumerate(wires, start=1) if to == number}
        slots, values = inputs_of(n, table, coming), values_of(n, table)
        for name, i in coming.items():
            origin, slot, target, _, type = wires[i - 1]
            place = next(k for k, s in enumerate(slots) if s["name"] == name)
            links.append(link(i, origin, slot, target, place, type))
        outputs = [
            {"name": name, "type": type, "links": leaving(wires, ends, number, slot)}
            for slot, (name, type) in enumerate(table[n.kind]["outputs"])
        ]
        width, height = max(300, table[n.kind]["size"][0]), table[n.kind]["size"][1]
        nodes.append(
            {"id": number, "type": n.kind, "pos": [x, 0], "size": [width, height], "flags": {}}
            | {"order": number - 1, "mode": 0, "inputs": slots, "outputs": outputs}
            | {"properties": {"Node name for S&R": n.kind}, "widgets_values": list(values.values())}
        )
        x += width + 60
    for i, (origin, slot, _, type) in enumerate(ends):
        links.append(link(len(wires) + 1 + i, origin, slot, RESULT, i, type))
    return outside(nodes, links, wires, ends, x)


def link(number, origin, slot, target, place, type) -> dict:
    """A wire inside of the subgraph."""
    return {
        "id": number, "origin_id": origin, "origin_slot": slot, "target_id": target, "target_slot": place,
        "type": type,
    }  # fmt: skip


def leaving(wires, ends, number, slot) -> list[int]:
    """The links from a node's output, inside of the subgraph and to its end."""
    out = [i for i, w in enumerate(wires, start=1) if w[0] == number and w[1] == slot]
    return out + [len(wires) + 1 + i for i, e in enumerate(ends) if e[0] == number and e[1] == slot]


def outside(nodes, links, wires, ends, right) -> dict:
    """The node that stands for the subgraph, and its definition."""
    asked = [("model", "MODEL"), ("clip", "CLIP"), ("latent_image", "LATENT"), ("negative", "CONDITIONING")]
    slots = [
        {"id": named("in", name), "name": name, "type": type, "pos": [-120, 20 * i]}
        | {"linkIds": [k for k, w in enumerate(wires, start=1) if w[0] == OUTSIDE and w[1] == i]}
        for i, (name, type) in enumerate(asked)
    ]
    results = [
        {"id": named("out", name), "name": name, "type": type, "pos": [right + 20, 20 * i]}
        | {"linkIds": [len(wires) + 1 + i]}
        for i, (_, _, name, type) in enumerate(ends)
    ]
    front = [("2", w) for w in ("sampler_name", "scheduler", "steps", "cfg", "samples")] + [("3", "method")]
    definition = {
        "id": named("definition"), "version": 1, "revision": 0, "config": {}, "name": NAME,
        "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(links), "lastRerouteId": 0},
        "inputNode": {"id": OUTSIDE, "bounding": [-240, -20, 120, 120]},
        "outputNode": {"id": RESULT, "bounding": [right, -20, 120, 80]},
        "inputs": slots, "outputs": results, "widgets": [], "nodes": nodes, "groups": [], "links": links,
        "extra": {}, "category": "Nibble", "description": DESCRIPTION,
    }  # fmt: skip
    shown = {
        "id": 4, "type": definition["id"], "pos": [0, 0], "size": [320, 280], "flags": {}, "order": 0,
        "mode": 0, "inputs": [{"name": name, "type": type, "link": None} for name, type in asked],
        "outputs": [{"name": name, "type": type, "links": None} for _, _, name, type in ends],
        "properties": {"proxyWidgets": [list(pair) for pair in front]}, "widgets_values": [], "title": NAME,
    }  # fmt: skip
    aliases = ["4bit", "4-bit", "quantize", "svdquant", "compress"]
    return {
        "id": named("workflow"), "revision": 0, "last_node_id": 4, "last_link_id": 0, "nodes": [shown],
        "links": [], "groups": [], "config": {}, "extra": {"BlueprintSearchAliases": aliases}, "version": 0.4,
        "definitions": {"subgraphs": [definition]},
    }  # fmt: skip


def text() -> str:
    """What the file says."""
    return json.dumps(made(), indent=1, ensure_ascii=False) + "\n"
