"""ComfyUI-Nibble. Importing this needs neither ComfyUI nor Triton nor a GPU."""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    """Called by ComfyUI when it loads the pack."""
    from .nodes import NibbleExtension

    return NibbleExtension()
