"""An ablation as text, in the order of the judge."""

from collections.abc import Sequence

from ..inputs import KINDS
from ..judge import LEVEL, over_seeds

COLUMNS = {
    "layer_db": "layer dB",
    "worst_db": "worst",
    "prediction_db": "prediction",
    "coherent_db": "coherent",
    "latent_db": "latent dB",
    "image_db": "image dB",
    "median_db": "median",
    "ssim": "SSIM",
    "bits": "bits",
    "cost": "beside",
    "cost_3072": "at 3072",
    "seconds": "s",
}
PAIRED = ("median", f"{LEVEL:.0%} of resamples", "better in", "over seeds")


def ordered(rows: list[dict], against: Sequence[str] = ()) -> list[dict]:
    """Rows with pictures first, by the median of their paired differences from the first row of `against`,
    or by their median picture where that has none; then the others by coherent SQNR."""
    base = base_of(rows, against[0]) if against else None

    def key(row):
        if "each_db" not in row:
            return (False, row["coherent_db"])
        return (True, row["median_db"] if base is None else over_seeds(base, row["each_db"])[0].median)

    return sorted(rows, key=key, reverse=True)


def base_of(rows: list[dict], name: str) -> list[list[float]] | None:
    """PSNR of each picture of the row of this name, a list a seed; None where it was not sampled."""
    return next((row["each_db"] for row in rows if row["name"] == name and "each_db" in row), None)


def ablation_text(rows: list[dict], against: Sequence[str] = ()) -> str:
    """A table in the order of `ordered`; then, picture by picture, every row against each row named in
    `against`; layers of other kinds; and the mean of each level of each factor."""
    factors, rows, width = by_factor(rows), ordered(rows, against), max(len(row["name"]) for row in rows)
    lines = [f"{'row':{width}}  " + "  ".join(f"{title:>{max(7, len(title))}}" for title in COLUMNS.values())]
    for row in rows:
        lines.append(
            f"{row['name']:{width}}  "
            + "  ".join(_cell(row.get(k), k).rjust(max(7, len(t))) for k, t in COLUMNS.items())
        )
    lines += [
        "",
        "prediction, coherent: SQNR in dB of the network's prediction on held-out calls, and with the mean "
        "error over a sampling as the noise.",
        "image dB: PSNR of all pictures as one, which a single one can set; median: of the median picture.",
        "bits: a weight of this 256-wide model, all side data.",
        "beside: multiply-adds of transform and low rank over those of the layers' products; at 3072: of a "
        "3072 x 3072 layer.",
    ]
    for name in against:
        lines += _picture_by_picture(rows, name, width)
    lines += [*_of_kinds(rows, width), ""]
    for factor, levels in factors.items():
        means = "  ".join(f"{level}: {mean:.2f} ({count})" for level, (mean, count) in levels.items())
        lines.append(f"mean coherent dB by {factor:9}  {means}")
    return "\n".join(lines)


def _picture_by_picture(rows, name, width):
    base = base_of(rows, name)
    others = [row for row in rows if "each_db" in row and row["name"] != name]
    if base is None or not others:
        return []
    lines = ["", f"picture by picture against {name}, dB; over seeds: standard deviation of the median"]
    lines.append(f"{'row':{width}}  " + "  ".join(title.rjust(17) for title in PAIRED))
    for row in others:
        found, spread = over_seeds(base, row["each_db"])
        cells = (
            f"{found.median:+.2f}",
            f"{found.low:+.2f} to {found.high:+.2f}",
            f"{found.wins:g} of {found.count}",
            "-" if spread is None else f"{spread:.2f}",
        )
        lines.append(f"{row['name']:{width}}  " + "  ".join(cell.rjust(17) for cell in cells))
    return lines


def _of_kinds(rows, width):
    found = [row for row in rows if "kinds" in row]
    if not found:
        return []
    lines = ["", "one synthetic layer of each kind of inputs, dB of its output (nibble bench-fit --kinds)"]
    lines.append(f"{'row':{width}}  " + "  ".join(KINDS))
    for row in found:
        cells = (f"{row['kinds'][kind]:.2f}".rjust(len(kind)) for kind in KINDS)
        lines.append(f"{row['name']:{width}}  " + "  ".join(cells))
    return lines


def _cell(value, key) -> str:
    if value is None:
        return "-"
    return (
        f"{100 * value:.2f}%"
        if key.startswith("cost")
        else f"{value:.0f}"
        if key == "seconds"
        else f"{value:.4f}"
        if key == "ssim"
        else f"{value:.2f}"
    )


def by_factor(rows: list[dict]) -> dict[str, dict[str, tuple[float, int]]]:
    """{factor: {level: (mean coherent SQNR, rows)}} of the factorial's rows."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for factor, level in row["levels"].items():
            found.setdefault(factor, {}).setdefault(str(level), []).append(row["coherent_db"])
    return {
        factor: {level: (sum(v) / len(v), len(v)) for level, v in levels.items()}
        for factor, levels in found.items()
    }
