"""The losses of a training as a picture."""

import json
from pathlib import Path

from ..charts.curves import curves
from ..charts.sheet import save

MOST = 8  # runs with a line of their own, as many as there are colours


def plot(path: Path, losses: Path):
    """The losses of the runs in Trainer's JSON file, as a PNG: of all, or of those that gained most. Raises
    ImportError without matplotlib."""
    runs = json.loads(Path(losses).read_text(encoding="utf-8"))
    gained = sorted(runs, key=lambda name: -runs[name]["gain_db"])[:MOST]
    lines = {
        f"{name}, {runs[name]['gain_db']:+.1f} dB": list(enumerate(runs[name]["losses"])) for name in gained
    }
    gloss = "1 at the start of a run; dB: what it gained on held-out inputs."
    if len(runs) > MOST:
        gloss = f"1 at the start of a run; the {MOST} of {len(runs)} that gained most."
    save(path, [curves("Loss of the training", gloss, lines, "step", log=True)])
