"""`nibble demo`: the small trained FLUX in full precision and under each method, with mild and hard
outliers."""

import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ...calibration import Calibration, calibrate
from ...calibration.plan import inputs_of
from ...diffusers_host.model import modules_of, place
from ...families import FLUX
from ...methods import METHODS, Method
from ...methods.rtn import RTNConfig
from ...run.layers import quantize_layers
from ...run.report import bits_per_weight, sqnr_summary
from ...run.source import Tensors
from ...store.atomic import replacing, require_writable, save_text
from ...store.progress import Progress, silent
from . import metrics, pictures, tiny_flux
from .outliers import add_outliers

SEVERITIES = {"mild": 0.4, "hard": 1.0}
CAPTIONS = (
    "large red circle center on plain blue background",
    "small yellow square left on striped green background",
    "large white ring right on checked purple background",
    "small blue triangle top on plain orange background",
    "large green cross bottom on striped white background",
    "small purple diamond center on checked yellow background",
    "large orange square top on plain black background",
    "small black circle bottom on checked red background",
)
# The contact sheet shows the captions above; 16 random ones more steady the figures (1 dB from seed to seed
# with 8).
JUDGED = (
    *CAPTIONS,
    *(pictures.random_scene(rng).caption for rng in [np.random.default_rng(11)] for _ in range(16)),
)
CALIBRATION_SAMPLES = 8
STEPS = 20

# The planted failure: one scale for a whole tensor. It must break, or the outliers are too mild to prove
# anything.
NAIVE = Method(
    "naive", "Per tensor W4A4", METHODS["rtn"].fit, RTNConfig(activation="tensor", weight="tensor")
)


def methods() -> list[Method]:
    """In the order of the contact sheet."""
    return [
        *(METHODS[name] for name in ("svdquant_r", "svdquant", "splitquant", "robuq", "convrot", "rtn")),
        NAIVE,
    ]


def calibrate_tiny(
    model,
    layers,
    folder,
    steps=10,
    samples=CALIBRATION_SAMPLES,
    progress: Progress = silent,
    model_hash="demo",
) -> Calibration:
    """Statistics of the small model over random captions, four pictures a run."""
    rng = np.random.default_rng(5)
    captions = [[pictures.random_scene(rng).caption for _ in range(4)] for _ in range(samples)]
    names = modules_of(FLUX, layers, model)
    inputs = inputs_of(layers)
    modules = {i.name: model.get_submodule(names[i.name][0]) for i in inputs}

    def run(sample, capture):
        with capture.watched(model, lambda args, kwargs: float(kwargs["timestep"][0])):
            tiny_flux.sample(model, captions[sample], steps, seed=100 + sample)

    return calibrate(
        run, modules, inputs, folder, {"model": model_hash}, samples=samples, memory=2**32, progress=progress
    )


def quantized_copy(model, layers, state_dict, method, calibration):
    """(a copy of the diffusers model with quantized layers in place, report rows)."""
    out, rows = copy.deepcopy(model), []
    names = modules_of(FLUX, layers, model)
    for layer, row in quantize_layers(layers, Tensors(state_dict), method, method.config, calibration):
        rows.append(row)
        if layer is not None:
            place(out, names[layer.name], layer)
    return out, rows


def judge(reference, latents, rows, rest_bytes) -> dict:
    """One method's entry of report.json."""
    want, got = pictures.decode(reference), pictures.decode(latents)
    return {
        "latent_psnr_db": round(metrics.latent_psnr_db(reference, latents), 2),
        "image_psnr_db": round(metrics.psnr_db(want, got, 1.0), 2),
        "high_frequency_ratio": round(metrics.high_frequency_ratio(want, got), 3),
        "layer_sqnr_db": {k: round(v, 2) for k, v in sqnr_summary(rows).items()},
        "bytes": sum(r.nbytes for r in rows) + rest_bytes,
        "block_bits_per_weight": round(bits_per_weight(rows), 3),
        "quantize_seconds": round(sum(r.seconds for r in rows), 2),
    }


def run_severity(severity: float, folder: Path, progress) -> tuple[dict, dict[str, torch.Tensor]]:
    """(report, {"reference" or method name: pictures}) at one severity of outliers."""
    state_dict = add_outliers(load_file(tiny_flux.CHECKPOINT), severity)
    model = tiny_flux.load(state_dict)
    layers = FLUX.layers({k: tuple(v.shape) for k, v in state_dict.items()})
    quantized_names = {layer.name for layer in layers}
    rest_bytes = sum(
        2 * t.numel() for k, t in state_dict.items() if k.rpartition(".")[0] not in quantized_names
    )
    started = time.perf_counter()
    calibration = calibrate_tiny(model, layers, folder, progress=progress)
    seconds = round(time.perf_counter() - started, 2)
    reference = tiny_flux.sample(model, JUDGED, STEPS, seed=7)
    report = {"reference": {"bytes": 2 * sum(t.numel() for t in state_dict.values())}, "methods": {}}
    shown = {"reference": pictures.decode(reference)}
    for method in progress(methods(), len(methods())):
        quantized, rows = quantized_copy(model, layers, state_dict, method, calibration)
        latents = tiny_flux.sample(quantized, JUDGED, STEPS, seed=7)
        report["methods"][method.name] = judge(reference, latents, rows, rest_bytes) | {
            "calibrate_seconds": seconds
        }
        shown[method.name] = pictures.decode(latents)
    return report, shown


def run(out: Path, progress: Progress = silent) -> dict:
    """Writes contact_sheet.png and report.json into `out`; returns the report: the hard outliers, and "mild"
    beside it."""
    import tempfile

    out = Path(out)
    sheet, figures = out / "contact_sheet.png", out / "report.json"
    for path in (sheet, figures):
        require_writable(path)
    reports, shown = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, severity in SEVERITIES.items():
            reports[name], shown[name] = run_severity(severity, Path(folder) / name, progress)
    report = {"outliers": "hard", **reports["hard"], "mild": reports["mild"]}
    contact_sheet(sheet, shown, reports)
    save_text(figures, json.dumps(report, indent=1) + "\n")
    return report


def contact_sheet(path, shown, reports):
    """One row a method, one column a caption, mild outliers on the left and hard ones on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(shown["hard"])
    figure, axes = plt.subplots(len(names), 2, figsize=(16, 1.25 * len(names)), squeeze=False)
    for column, severity in enumerate(SEVERITIES):
        for row, name in enumerate(names):
            axis = axes[row][column]
            axis.imshow(
                torch.cat(list(shown[severity][name][: len(CAPTIONS)]), 1).numpy(), interpolation="nearest"
            )
            axis.set_xticks([])
            axis.set_yticks([])
            score = reports[severity]["methods"].get(name)
            axis.set_ylabel(
                name + ("" if score is None else f"\n{score['image_psnr_db']:.1f} dB"),
                rotation=0,
                ha="right",
                va="center",
            )
        axes[0][column].set_title(f"{severity} outliers")
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
    plt.close(figure)


def pictures_text(report: dict) -> str:
    """The report as a table."""
    lines = [
        f"{'outliers':8}  {'method':11}  {'image dB':>8}  {'latent dB':>9}  {'high freq':>9}  "
        f"{'layer dB':>8}  {'worst':>6}  {'bits':>5}  {'MB':>5}  {'fit s':>6}"
    ]
    for severity, part in (("mild", report["mild"]), ("hard", report)):
        for name, m in part["methods"].items():
            layer = m["layer_sqnr_db"]
            lines.append(
                f"{severity:8}  {name:11}  {m['image_psnr_db']:8.2f}  {m['latent_psnr_db']:9.2f}  "
                f"{m['high_frequency_ratio']:9.3f}  "
                f"{layer['mean']:8.2f}  {layer['min']:6.2f}  {m['block_bits_per_weight']:5.2f}  "
                f"{m['bytes'] / 1e6:5.2f}  {m['quantize_seconds']:6.1f}"
            )
    return "\n".join(lines)
