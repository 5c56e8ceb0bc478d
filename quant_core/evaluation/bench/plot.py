"""The figure beside the report: speed-ups at FLUX's token count, or the errors found where nothing was
timed."""

from pathlib import Path

from ...store.atomic import replacing
from .cases import FLUX_TOKENS


def draw(doc: dict, path: Path):
    """Writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in doc["rows"] if r["cells"].get("torch", {}).get("ms")]
    rows = [r for r in rows if r["m"] == FLUX_TOKENS] or rows
    figure, axes = plt.subplots(figsize=(max(8, 1.1 * len(rows or doc["rows"])), 5), layout="constrained")
    (_speed if rows else _errors)(axes, rows or doc["rows"])
    figure.legend(loc="outside lower center", fontsize="small", ncols=5)
    figure.suptitle(doc["machine"]["device"])
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def _speed(axes, rows):
    names = dict.fromkeys(
        name for r in rows for name, c in r["cells"].items() if c.get("speedup") and name != "torch"
    )
    _bars(axes, rows, {name: [r["cells"].get(name, {}).get("speedup") or 0 for r in rows] for name in names})
    least = [(i, r["cells"]["torch"]["ms"] / r["least_ms"]) for i, r in enumerate(rows) if r["least_ms"]]
    if least:
        axes.hlines(
            [v for _, v in least],
            [i - 0.45 for i, _ in least],
            [i + 0.45 for i, _ in least],
            colors="black",
            label="roofline, int8",
        )
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_ylabel("speed relative to torch's 16-bit linear")
    axes.set_title(f"M {', '.join(str(m) for m in sorted({r['m'] for r in rows}))}", fontsize="medium")


def _errors(axes, rows):
    names = dict.fromkeys(name for r in rows for name in r["checks"])
    error = lambda r, name: r["checks"].get(name, {}).get("naive", {}).get("error") or 0
    _bars(axes, rows, {name: [error(r, name) for r in rows] for name in names})
    axes.set_ylabel("relative error against the naive operator")
    axes.set_title("verification only, nothing was timed", fontsize="medium")


def _bars(axes, rows, series):
    width = 0.9 / max(len(series), 1)
    for i, (name, values) in enumerate(series.items()):
        axes.bar([x - 0.45 + (i + 0.5) * width for x in range(len(rows))], values, width, label=name)
    axes.margins(x=0.01)
    axes.set_xticks(range(len(rows)), [f"{r['model']}\n{r['n']} x {r['k']}" for r in rows], fontsize="small")
