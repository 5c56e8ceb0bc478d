"""docs/models.md: what the pack makes of each of ComfyUI's models. `python -m
comfyui_nibble.tests.host.sweep.page` writes it anew, with COMFYUI_PATH set as for the host tests; a test
fails where it is stale."""

import sys
from pathlib import Path

from comfyui_nibble.tests.host.sweep.full_width import Facts, facts
from comfyui_nibble.tests.host.sweep.registry import SECTIONS, WITHOUT

PAGE = Path(__file__).resolve().parents[3] / "docs" / "models.md"
WORTH = 0.005  # share of the weights from which what stays in 16 bit is named
_HEAD = """# Models

Every diffusion model class of ComfyUI, as ComfyUI names it. The test suite takes a small random instance of each through Nibble Calibrate,
Nibble Quantize, Nibble Save Model, Nibble Load Diffusion Model and a LoRA: the quantized network predicts what the full-precision one does,
the saved file predicts the same bit for bit, and the LoRA moves both alike.

- **Map**: the family whose map says which layers are quantized and how; "rules" where they are found by names and shapes and confirmed by
  a calibration.
- **Quantized**: share of the network's weights in 4 bits at full width.
- **bf16, 4 bit**: size of the network in GB before and after (svdquant_r, rank 32, all side data).
- **In 16 bit**: what stays and why, with its share and its largest tensor, from half a percent of the weights on. A calibration leaves in
  16 bit as well what it never saw called, and without a map what measures far worse than the rest.

Without a map a calibration finds what a map would say: which layers share an input, which read the output of a GELU (and get the unsigned
codes that are worth a bit there), which modulate. The tests hold this for Krea 2, HunyuanVideo 1.5, LTX-2, Anima and Ideogram 4, so that
a map of theirs would change no file made in the graph. `nibble quantize` without a calibration knows no GELU there.
Qwen-Image 2.1, which came to ComfyUI after the version that the tests run, has other layers than Qwen-Image (one SwiGLU, q, k and v of one
stream) and goes by the rules; a test holds that they take every layer of its blocks.

This page is made by the test suite: `python -m comfyui_nibble.tests.host.sweep.page`.
"""


def text() -> str:
    """The whole page."""
    lines = [_HEAD]
    for title, entries in SECTIONS.items():
        lines += [
            f"## {title}",
            "",
            "| class | map | quantized | bf16 | 4 bit | in 16 bit |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [row(entry, facts(entry)) for entry in entries]
        lines += ["", *[f"`{e.id}`: {e.note}\n" for e in entries if e.note]]
    lines += ["## Not quantized", "", *(f"- `{name}`: {why}" for name, why in WITHOUT.items()), ""]
    return "\n".join(lines)


def row(entry, found: Facts) -> str:
    """An entry's line of a table."""
    name = f"{entry.name}, {entry.variant}" if entry.variant else entry.name
    share = lambda count: f"{100 * count / found.weights:.1f} %"
    kept = [
        f"{share(count)} {why}" + f" (`{largest}`)" * bool(largest)
        for why, (count, largest) in found.kept.items()
        if count >= WORTH * found.weights
    ]
    sizes = f"{2 * found.weights / 1e9:.1f} GB | {found.nbytes / 1e9:.1f} GB"
    return f"| {name} | {found.family} | {share(found.quantized)} | {sizes} | {', '.join(kept) or '-'} |"


def rows(page: str) -> list[str]:
    """Its lines of facts: tables and lists."""
    return [line for line in page.splitlines() if line.startswith(("|", "- `", "`", "## "))]


if __name__ == "__main__":
    from comfyui_nibble.tests.host.server import find_comfyui

    sys.path.append(str(find_comfyui()))
    sys.argv = sys.argv[:1]
    from comfy.cli_args import args

    args.cpu = True
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text())
