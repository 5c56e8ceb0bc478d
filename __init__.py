"""ComfyUI-Nibble. Importing this needs neither ComfyUI nor Triton nor a GPU."""

import logging
import re

WEB_DIRECTORY = "./nodes/web"
TESTED, OLDEST = (
    (0, 31, 0),
    (0, 24, 0),
)  # versions of ComfyUI: all tests run on the first and later, the main job ran on the second too


async def comfy_entrypoint():
    """Called by ComfyUI when it loads the pack. Raises RuntimeError, of which ComfyUI logs one line, where
    the host is too old."""
    from comfyui_version import __version__

    require_host(__version__)
    from .nodes import NibbleExtension

    return NibbleExtension()


def require_host(version: str):
    """Raises RuntimeError for a ComfyUI that cannot run the nodes, and warns of one that nobody tests. A
    version of no numbers passes."""
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", version)
    found = tuple(int(n or 0) for n in match.groups()) if match else TESTED
    wanted = f"ComfyUI-Nibble needs ComfyUI {'.'.join(map(str, TESTED))} or newer, this is {version}"
    if found < OLDEST:
        raise RuntimeError(f"{wanted}. Update ComfyUI.")
    if found < TESTED:
        oldest, before = ".".join(map(str, OLDEST[:2])), f"{TESTED[0]}.{TESTED[1] - 1}"
        logging.warning(
            f"{wanted}. On {oldest} to {before} calibrating, quantizing, saving, loading and LoRAs ran; "
            "the rest was not tried there. "
            "Update ComfyUI where something fails."
        )
