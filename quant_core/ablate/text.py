"""The rows of an ablation as a table and as a plot."""

from pathlib import Path

COLUMNS = (
    ("layer_db", "layer", "{:.2f}"), ("worst_db", "worst", "{:.2f}"), ("prediction_db", "predict", "{:.2f}"), ("coherent_db", "coherent", "{:.2f}"),
    ("image_db", "image", "{:.2f}"), ("median_db", "median", "{:.2f}"), ("latent_db", "latent", "{:.2f}"), ("bits", "bits", "{:.2f}"), ("transform_share", "transform", "{:.1%}"),
    ("transform_share_3072", "at 3072", "{:.1%}"), ("seconds", "seconds", "{:.0f}"),
)  # fmt: skip
LEGEND = (
    "dB. layer, worst: SQNR of the layers' outputs on held-out tokens, mean and least. predict: of the network's prediction on held-out "
    "recorded inputs.\ncoherent: the same of the mean over the steps of a sampling run, which a sampler adds up. image, latent: PSNR of all "
    "of 48 pictures; median: of a picture.\ntransform: its multiply-adds over the product's, in this model and in a layer of 3072 x 3072."
)
FACTORS = ("slices", "P", "transform", "scales", "clip")


def as_text(rows: list[dict]) -> str:
    """Best mean over steps first, and below it the mean of each level of each factor."""
    width = max(len(r["name"]) for r in rows)
    lines = ["  ".join([f"{'':{width}}", *(f"{title:>9}" for _, title, _ in COLUMNS)])]
    for row in sorted(rows, key=lambda r: -r["coherent_db"]):
        cells = (f"{form.format(row[key]) if key in row else '-':>9}" for key, _, form in COLUMNS)
        lines.append("  ".join([f"{row['name']:{width}}", *cells]))
    lines += ["", LEGEND, ""]
    for name, levels in main_effects(rows).items():
        lines.append(f"{name}: " + ", ".join(f"{level} {layer:.2f} / {coherent:.2f}" for level, (layer, coherent) in levels.items()))
    return "\n".join([*lines, "(layer / coherent, means over all rows of the factorial with that level)"])


def main_effects(rows: list[dict]) -> dict[str, dict]:
    """{factor: {level: (mean layer_db, mean coherent_db)}} of the rows of the factorial."""
    out = {}
    for name in FACTORS:
        grouped = {}
        for row in rows:
            if name in row:
                grouped.setdefault(row[name], []).append((row["layer_db"], row["coherent_db"]))
        out[name] = {level: tuple(sum(v) / len(v) for v in zip(*found, strict=True)) for level, found in sorted(grouped.items())}
    return out


def plot(path: Path, rows: list[dict]):
    """Coherent SQNR against the transform's cost, pictures against coherent SQNR, and the factors' main effects."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    cost, seen, effects = figure.subplots(1, 3)
    for scales in sorted({r["scales"] for r in rows if "scales" in r}):
        chosen = [r for r in rows if r.get("scales") == scales and "transform_share" in r]
        cost.scatter([100 * r["transform_share_3072"] for r in chosen], [r["coherent_db"] for r in chosen], s=14, label=f"scales: {scales}")
    cost.set_xlabel("transform's multiply-adds over the product's at 3072 x 3072, %")
    cost.set_ylabel("SQNR of the prediction's mean over steps, dB")
    cost.legend(fontsize=8)
    for row in rows:
        if "image_db" in row:
            seen.scatter(row["coherent_db"], row["image_db"], s=14, color="C0")
            if "slices" not in row:
                seen.annotate(row["name"], (row["coherent_db"], row["image_db"]), fontsize=7)
    seen.set_xlabel("SQNR of the prediction's mean over steps, dB")
    seen.set_ylabel("image PSNR, dB")
    bars = [(f"{name} {level}", coherent) for name, levels in main_effects(rows).items() for level, (_, coherent) in levels.items()]
    effects.barh([b[0] for b in bars], [b[1] for b in bars])
    effects.set_xlim(left=min((b[1] for b in bars), default=1) - 1)
    effects.invert_yaxis()
    effects.set_xlabel("mean over the factorial, dB")
    effects.tick_params(axis="y", labelsize=7)
    FigureCanvasAgg(figure).print_png(str(path))
