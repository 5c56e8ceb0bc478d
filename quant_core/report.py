"""What quantization cost, layer by layer, as text and as JSON."""

from dataclasses import asdict, dataclass, field


@dataclass
class Row:
    """One layer. what: its spec in short, or "16 bit"; sqnr_db: of its output on held-out tokens, None if not measured."""

    name: str
    block: str
    in_features: int
    out_features: int
    what: str
    sqnr_db: float | None = None
    nbytes: int = 0
    seconds: float = 0.0
    choices: dict = field(default_factory=dict)
    note: str = ""

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def quantized(self) -> bool:
        return self.nbytes > 0

    def to_json(self) -> dict:
        return asdict(self)


def bits_per_weight(rows) -> float:
    """Of the quantized layers, all side data counted."""
    rows = [r for r in rows if r.quantized]
    return 8 * sum(r.nbytes for r in rows) / max(1, sum(r.weights for r in rows))


def sqnr_summary(rows) -> dict:
    """{"mean", "min"} in dB over the layers whose error was measured; None without calibration."""
    measured = [r.sqnr_db for r in rows if r.sqnr_db is not None]
    if not measured:
        return {"mean": None, "min": None}
    return {"mean": sum(measured) / len(measured), "min": min(measured)}


def as_text(rows, title: str, notes=(), paths=None) -> str:
    """A summary and a table, worst layers first. paths: {layer: the kernels it runs on}, of `kernels.paths_of`."""
    done = [r for r in rows if r.quantized]
    kept = [r for r in rows if not r.quantized]
    before, after = 2 * sum(r.weights for r in done), sum(r.nbytes for r in done)
    lines = [
        title,
        f"{len(done)} layers: {before / 2**20:.1f} MiB at 16 bit -> {after / 2**20:.1f} MiB, {bits_per_weight(rows):.2f} bits a weight with all side data",
    ]
    summary = sqnr_summary(rows)
    if summary["mean"] is None:
        lines.append("Layer errors were not measured: no calibration was connected.")
    else:
        lines.append(f"Layer SQNR on held-out tokens: mean {summary['mean']:.1f} dB, worst {summary['min']:.1f} dB")
    lines += [f"Left in 16 bit: {r.name} ({r.note})" for r in kept]
    lines += list(notes)
    lines.append("")
    width = max([len(r.name) for r in rows], default=4)
    lines.append(f"{'layer':{width}}  {'N x K':>13}  {'SQNR dB':>7}  {'bits':>5}  {'seconds':>7}  what")
    for r in sorted(done, key=lambda r: (r.sqnr_db is None, r.sqnr_db or 0)):
        sqnr = "      -" if r.sqnr_db is None else f"{r.sqnr_db:7.2f}"
        shape = f"{r.out_features} x {r.in_features}"
        chosen = "; ".join(f"{k} {v}" for k, v in r.choices.items())
        lines.append(
            f"{r.name:{width}}  {shape:>13}  {sqnr}  {8 * r.nbytes / r.weights:5.2f}  {r.seconds:7.2f}  {r.what}"
            + f" ({chosen})" * bool(chosen)
            + (f", {paths[r.name]}" if paths and r.name in paths else "")
        )
    return "\n".join(lines)
