"""`nibble demo --wishes`: what each wish makes of a small model, in bytes, seconds and dB."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from safetensors.torch import load_file, save_file

from ..diffusers_host.model import load
from ..evaluation.demo import metrics
from ..evaluation.demo.model import SmallModel
from ..evaluation.demo.run import calibrate_tiny
from ..evaluation.judge import paired
from ..formats.checkpoint import Checkpoint
from ..formats.nibble import PackFile
from ..run.sizes import sizes
from ..store.progress import Progress, silent
from .wish import quantize_by_wish

WISHES = ("balanced", "fast", "best", "smallest")  # those that ask for no size; paired with the first
SAMPLES = 16  # of the calibration, four pictures each
SEVERITY = 1.0


def measure_wishes(
    small: SmallModel, progress: Callable[[str], Progress] = lambda unit: silent
) -> list[dict]:
    """A row for each of WISHES on a small model with hard outliers: its bytes and those of the model in 16
    bit, seconds of the calibration and of the rest, PSNR in dB of the judged captions' pictures against full
    precision, and the difference to the first wish, picture by picture."""
    state = small.with_outliers(load_file(small.checkpoint), SEVERITY)
    model, rows = small.load(state), []
    layers = small.family.layers({k: tuple(v.shape) for k, v in state.items()})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({k: v.contiguous() for k, v in state.items()}, source := folder / "model.safetensors")
        known, begun = Checkpoint(source).fingerprint(), time.perf_counter()
        calibration = calibrate_tiny(
            model, layers, folder / "c", samples=SAMPLES, small=small, model_hash=known,
            progress=progress("sample"),
        )  # fmt: skip
        sampled = time.perf_counter() - begun
        sample = lambda network: small.world.decode(small.sample(network, small.judged, small.steps, seed=7))
        want = sample(model)
        for wish in progress("wish")(WISHES, len(WISHES)):
            begun, made = time.perf_counter(), folder / f"{wish}.safetensors"
            given = None if wish == "fast" else calibration
            _, report = quantize_by_wish(source, made, wish, given)
            seconds, quantized = time.perf_counter() - begun, load(dict(model.config), made)
            each = [metrics.psnr_db(a, b, 1.0) for a, b in zip(want, sample(quantized), strict=True)]
            after, before = sizes(report, PackFile(made).logical_shapes())
            rows.append(
                {
                    "wish": wish,
                    "bytes": after,
                    "bytes_16_bit": before,
                    "calibrate_seconds": 0.0 if given is None else sampled,
                    "seconds": seconds,
                    "each_psnr_db": each,
                }
            )
    return rows


def wishes_text(rows: list[dict]) -> str:
    """A line for each wish."""
    lines = [f"{'wish':9}  {'MB':>5}  {'of':>5}  {'calibrate s':>11}  {'fit s':>6}  {'median dB':>9}"]
    base = rows[0]
    for row in rows:
        against = ""
        if row is not base:
            against = f"  {paired(base['each_psnr_db'], row['each_psnr_db'])} than {base['wish']}"
        lines.append(
            f"{row['wish']:9}  {row['bytes'] / 1e6:5.2f}  {row['bytes_16_bit'] / 1e6:5.2f}  "
            f"{row['calibrate_seconds']:11.0f}  {row['seconds']:6.0f}  "
            f"{median(row['each_psnr_db']):9.1f}{against}"
        )
    return "\n".join(lines)
