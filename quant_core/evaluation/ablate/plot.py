"""An ablation as a picture."""

from pathlib import Path

from ...store.atomic import replacing
from .run import by_factor


def plot(path: Path, rows: list[dict]):
    """Coherent SQNR against cost, pictures against coherent SQNR, and each factor's means, as a PNG. Raises
    ImportError without matplotlib."""
    with replacing(path) as temporary:
        figure(rows).savefig(temporary, dpi=100, format="png")


def figure(rows: list[dict]):
    """Other methods and trained rows have colors of their own; bars start at the least mean less half a
    dB."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(17, 5.5), layout="constrained")
    cost, image, bars = made.subplots(1, 3)
    kinds = {"untrained": lambda r: bool(r["levels"]), "trained": lambda r: "trained" in r["name"]}
    kinds["other methods"] = lambda r: not any(kinds[k](r) for k in ("untrained", "trained"))
    for kind, belongs in kinds.items():
        mine = [r for r in rows if belongs(r)]
        sampled = [r for r in mine if "image_db" in r]
        cost.scatter([100 * r["cost"] for r in mine], [r["coherent_db"] for r in mine], label=kind, s=18)
        image.scatter([r["coherent_db"] for r in sampled], [r["image_db"] for r in sampled], label=kind, s=18)
        for r in mine if kind == "other methods" else ():
            cost.annotate(r["name"], (100 * r["cost"], r["coherent_db"]), fontsize=8)
            if "image_db" in r:
                image.annotate(r["name"], (r["coherent_db"], r["image_db"]), fontsize=8)
    cost.set(xlabel="multiply-adds beside the products, %", ylabel="coherent SQNR of predictions, dB")
    image.set(xlabel="coherent SQNR of predictions, dB", ylabel="PSNR of pictures, dB")
    cost.legend()
    means = [
        (f"{factor} {level}", mean)
        for factor, levels in by_factor(rows).items()
        for level, (mean, _) in levels.items()
    ]
    bars.barh([name for name, _ in means], [mean for _, mean in means])
    if means:
        bars.set_xlim(left=min(mean for _, mean in means) - 0.5)
    bars.invert_yaxis()
    bars.set(xlabel="mean coherent SQNR of the factorial, dB")
    return made
