"""The nodes' names and tooltips as ComfyUI's frontend translates them: `locales/<language>/nodeDefs.json`.

`python -m comfyui_nibble.tests.host.locales` writes the English one anew from the schemas. The Chinese one
has the same keys and is written by hand.
"""

import asyncio
import json
from pathlib import Path

from comfyui_nibble.tests.host.server import PACK

FOLDER = PACK / "locales"
ENGLISH = FOLDER / "en" / "nodeDefs.json"


def definitions() -> dict[str, dict]:
    """{node id: {"display_name", "description", "inputs", "outputs"}} of all nodes, from their schemas.

    Inputs by their id, with a full stop as "_" where the frontend looks them up; outputs by their number.
    Needs ComfyUI on the path.
    """
    from comfyui_nibble.nodes import NibbleExtension

    nodes = asyncio.run(NibbleExtension().get_node_list())
    return {s.node_id: _definition(s) for s in (node.define_schema() for node in nodes)}


def _definition(schema) -> dict:
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {name: text for found in schema.inputs for name, text in _inputs(found)},
        "outputs": {str(n): _text(found) for n, found in enumerate(schema.outputs)},
    }


def _inputs(found):
    """(key, text) of an input; of one that grows a pair for each place that it may have."""
    if (template := getattr(found, "template", None)) is None:
        yield found.id, _text(found)
        return
    for name in template.names:
        yield f"{found.id}_{name}", {"name": name, "tooltip": template.input.tooltip}


def _text(found) -> dict:
    return {"name": found.display_name or found.id, "tooltip": found.tooltip}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import sys

    from comfyui_nibble.tests.host.server import find_comfyui

    sys.path.append(str(find_comfyui()))
    sys.argv = sys.argv[:1]
    from comfy.cli_args import args

    args.cpu = True
    write(ENGLISH, definitions())
