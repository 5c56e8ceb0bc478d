"""What saved workflows name of the nodes: ids, inputs and outputs, beside a snapshot. `python -m
comfyui_nibble.tests.host.test_schemas` writes it anew."""

import asyncio
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

SNAPSHOT = Path(__file__).with_name("schemas.json")
FROM_HOST = ("sampler_name", "scheduler", "model_name")  # combos whose options are ComfyUI's, or files
ADVICE = (
    "The nodes' schemas are not those of tests/host/schemas.json. Workflows that people have saved name "
    "nodes, inputs, outputs and options as they were: bring the old names back, or, where the change is "
    "meant, run `python -m comfyui_nibble.tests.host.test_schemas`, `tests.host.templates.kinds` and "
    "`tests.host.templates.write` behind it, change the help pages in nodes/web/docs/ with it, and say it\n"
    "in CHANGELOG.md.\n"
)


def described(node) -> dict:
    """What workflows name of a node; inputs and outputs in their order, by which widgets' values are kept."""
    schema = node.define_schema()
    return {
        "display_name": schema.display_name,
        "inputs": {i.id: _input(i) for i in schema.inputs},
        "outputs": {o.id: o.get_io_type() for o in schema.outputs},
    }


def _input(found) -> dict:
    out = {"type": found.get_io_type(), "optional": bool(found.optional)}
    if (default := getattr(found, "default", None)) is not None:
        out["default"] = default
    if getattr(found, "options", None) is not None and found.id not in FROM_HOST:
        out["options"] = list(found.options)
    if (template := getattr(found, "template", None)) is not None:
        out["grows"] = {"type": template.input.get_io_type(), "names": template.names}
    return out


def schemas() -> dict[str, dict]:
    """{node id: what workflows name of it} of all nodes of the pack."""
    from comfyui_nibble.nodes import NibbleExtension

    nodes = asyncio.run(NibbleExtension().get_node_list())
    return {node.define_schema().node_id: described(node) for node in nodes}


def differences(old, new, where="") -> list[str]:
    """One line for each place where two snapshots differ, order within mappings included."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{where}: {old!r} became {new!r}"]
    out = [f"{where}.{key} is gone".lstrip(".") for key in old if key not in new]
    out += [f"{where}.{key} is new".lstrip(".") for key in new if key not in old]
    for key in old:
        if key in new:
            out += differences(old[key], new[key], f"{where}.{key}".lstrip("."))
    if not out and list(old) != list(new):
        out.append(f"{where}: the order was {', '.join(old)}, now it is {', '.join(new)}")
    return out


def write():
    """The snapshot anew, from the nodes as they are."""
    SNAPSHOT.write_text(json.dumps(schemas(), indent=1) + "\n", encoding="utf-8")


def test_nodes_are_what_saved_workflows_name(comfy):
    found = differences(json.loads(SNAPSHOT.read_text(encoding="utf-8")), schemas())
    assert not found, ADVICE + "\n".join(found)


def test_a_renamed_input_is_told(comfy):
    old = {"Node": {"inputs": {"model": {"type": "MODEL"}, "rank": {"type": "INT"}}}}
    new = {"Node": {"inputs": {"model": {"type": "CLIP"}, "bits": {"type": "INT"}}}}
    assert differences(old, new) == [
        "Node.inputs.rank is gone",
        "Node.inputs.bits is new",
        "Node.inputs.model.type: 'MODEL' became 'CLIP'",
    ]
    turned = {"Node": {"inputs": dict(reversed(old["Node"]["inputs"].items()))}}
    assert differences(old, turned) == ["Node.inputs: the order was model, rank, now it is rank, model"]
    assert differences(old, old) == []


if __name__ == "__main__":
    import sys

    from comfyui_nibble.tests.host.server import find_comfyui

    sys.path.append(str(find_comfyui()))
    sys.argv = sys.argv[:1]
    from comfy.cli_args import args

    args.cpu = True
    write()
