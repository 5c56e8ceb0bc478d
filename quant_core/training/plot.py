"""The losses of a training as a picture."""

import json
from pathlib import Path

from ..store.atomic import replacing


def plot(path: Path, losses: Path):
    """The losses of every run, of Trainer's JSON file, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = json.loads(Path(losses).read_text(encoding="utf-8"))
    figure, axis = plt.subplots(figsize=(9, 5))
    for name, run in runs.items():
        axis.plot(run["losses"], label=f"{name} ({run['gain_db']:+.1f} dB held out)", linewidth=1)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("loss, 1 at the start of a run")
    axis.legend(fontsize=7)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
    plt.close(figure)
