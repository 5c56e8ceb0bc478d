"""`nibble demo`: a small trained model in full precision and under each method, with mild and hard
outliers."""

import copy
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ...calibration import Calibration, calibrate
from ...calibration.plan import inputs_of
from ...diffusers_host.model import modules_of, place
from ...methods import METHODS, Method
from ...methods.rtn import RTNConfig
from ...run.layers import quantize_layers
from ...run.report import bits_per_weight, sqnr_summary
from ...run.source import Tensors
from ...store.atomic import require_writable, save_text
from ...store.progress import Progress, silent
from ..judge import Paired, paired
from . import landscape_flux, metrics, shield_pixart, tiny_flux
from .model import SmallModel
from .sheet import contact_sheet

MODELS: dict[str, SmallModel] = {
    "landscapes": landscape_flux.MODEL,
    "shapes": tiny_flux.MODEL,
    "shields": shield_pixart.MODEL,
}

SEVERITIES = {"mild": 0.4, "hard": 1.0}
CALIBRATION_SAMPLES = 8
STEPS = tiny_flux.MODEL.steps
PAIRED_WITH = "svdquant"  # the method that others are compared with picture by picture

# The planted failure: one scale for a whole tensor. It must break, or the outliers are too mild to prove
# anything.
NAIVE = Method(
    "naive", "Per tensor W4A4", METHODS["rtn"].fit, RTNConfig(activation="tensor", weight="tensor")
)


def methods() -> list[Method]:
    """In the order of the contact sheet."""
    return [
        *(METHODS[name] for name in ("svdquant_r", "svdquant_p", "svdquant", "splitquant", "robuq")),
        *(METHODS[name] for name in ("convrot", "rtn")),
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
    small: SmallModel = tiny_flux.MODEL,
    seed: int = 0,
) -> Calibration:
    """Statistics of a small model over random captions, four pictures a run. seed: of captions and noise."""
    rng = np.random.default_rng(5 + seed)
    captions = [[small.world.random_scene(rng).caption for _ in range(4)] for _ in range(samples)]
    names = modules_of(small.family, layers, model)
    inputs = inputs_of(layers)
    modules = {i.name: model.get_submodule(names[i.name][0]) for i in inputs}

    def run(sample, capture):
        with capture.watched(model, lambda args, kwargs: float(kwargs["timestep"][0])):
            small.sample(model, captions[sample], steps, seed=100 + 1000 * seed + sample)

    return calibrate(
        run,
        modules,
        inputs,
        folder,
        {"model": model_hash},
        samples=samples,
        memory=2**32,
        seed=seed,
        progress=progress,
    )


def quantized_copy(
    model,
    layers,
    state_dict,
    method,
    calibration,
    small: SmallModel = tiny_flux.MODEL,
):
    """(a copy of the diffusers model with quantized layers in place, report rows)."""
    out, rows = copy.deepcopy(model), []
    names = modules_of(small.family, layers, model)
    for layer, row in quantize_layers(layers, Tensors(state_dict), method, method.config, calibration):
        rows.append(row)
        if layer is not None:
            place(out, names[layer.name], layer)
    return out, rows


def judge(want, got, reference, latents, rows, rest_bytes) -> dict:
    """One method's entry of report.json, from pictures wanted and got and their latents."""
    return {
        "latent_psnr_db": round(metrics.latent_psnr_db(reference, latents), 2),
        "image_psnr_db": round(metrics.psnr_db(want, got, 1.0), 2),
        "each_psnr_db": [round(metrics.psnr_db(a, b, 1.0), 2) for a, b in zip(want, got, strict=True)],
        "ssim": round(metrics.ssim(want, got), 4),
        "high_frequency_ratio": round(metrics.high_frequency_ratio(want, got), 3),
        "layer_sqnr_db": {k: round(v, 2) for k, v in sqnr_summary(rows).items()},
        "bytes": sum(r.nbytes for r in rows) + rest_bytes,
        "block_bits_per_weight": round(bits_per_weight(rows), 3),
        "quantize_seconds": round(sum(r.seconds for r in rows), 2),
    }


def run_severity(
    small: SmallModel, severity: float, folder: Path, progress
) -> tuple[dict, dict[str, torch.Tensor]]:
    """(report, {"reference" or method name: pictures}) at one severity of outliers."""
    state_dict = small.with_outliers(load_file(small.checkpoint), severity)
    model = small.load(state_dict)
    layers = small.family.layers({k: tuple(v.shape) for k, v in state_dict.items()})
    quantized_names = {layer.name for layer in layers}
    rest_bytes = sum(
        2 * t.numel() for k, t in state_dict.items() if k.rpartition(".")[0] not in quantized_names
    )
    started = time.perf_counter()
    calibration = calibrate_tiny(model, layers, folder, progress=progress, small=small)
    seconds = round(time.perf_counter() - started, 2)
    captions, decode = small.judged, small.world.decode
    reference = small.sample(model, captions, small.steps, seed=7)
    report = {"reference": {"bytes": 2 * sum(t.numel() for t in state_dict.values())}, "methods": {}}
    shown = {"reference": decode(reference)}
    for method in progress(methods(), len(methods())):
        quantized, rows = quantized_copy(
            model,
            layers,
            state_dict,
            method,
            calibration,
            small,
        )
        latents = small.sample(quantized, captions, small.steps, seed=7)
        got = shown[method.name] = decode(latents)
        figures = judge(shown["reference"], got, reference, latents, rows, rest_bytes)
        report["methods"][method.name] = figures | {"calibrate_seconds": seconds}
    base = report["methods"][PAIRED_WITH]["each_psnr_db"]
    for name, figures in report["methods"].items():
        if name != PAIRED_WITH:
            figures["paired"] = asdict(paired(base, figures["each_psnr_db"]))
    return report, shown


def run(out: Path, progress: Progress = silent, name: str = "landscapes") -> dict:
    """Writes contact_sheet.png and report.json into `out`; returns the report of a model of MODELS: the hard
    outliers, and "mild" beside it."""
    import tempfile

    small = MODELS[name]

    out = Path(out)
    sheet, figures = out / "contact_sheet.png", out / "report.json"
    for path in (sheet, figures):
        require_writable(path)
    reports, shown = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for outliers, severity in SEVERITIES.items():
            reports[outliers], shown[outliers] = run_severity(
                small, severity, Path(folder) / outliers, progress
            )
    report = {"model": f"{name}, a small {small.kind}", "outliers": "hard", **reports["hard"]}
    report["mild"] = reports["mild"]
    contact_sheet(sheet, shown, reports, {m.name: m.title for m in methods()}, f"One small {small.kind}")
    save_text(figures, json.dumps(report, indent=1) + "\n")
    return report


def pictures_text(report: dict) -> str:
    """The report as a table."""
    lines = [
        f"{'outliers':8}  {'method':11}  {'image dB':>8}  {'SSIM':>5}  {'latent dB':>9}  {'high freq':>9}  "
        f"{'layer dB':>8}  {'worst':>6}  {'bits':>5}  {'MB':>5}  {'fit s':>6}  picture by picture, against "
        f"{PAIRED_WITH}"
    ]
    for severity, part in (("mild", report["mild"]), ("hard", report)):
        for name, m in part["methods"].items():
            layer, pairs = m["layer_sqnr_db"], m.get("paired")
            lines.append(
                f"{severity:8}  {name:11}  {m['image_psnr_db']:8.2f}  {m['ssim']:5.3f}  "
                f"{m['latent_psnr_db']:9.2f}  "
                f"{m['high_frequency_ratio']:9.3f}  "
                f"{layer['mean']:8.2f}  {layer['min']:6.2f}  {m['block_bits_per_weight']:5.2f}  "
                f"{m['bytes'] / 1e6:5.2f}  {m['quantize_seconds']:6.1f}  "
                f"{Paired(**pairs) if pairs else ''}".rstrip()
            )
    return "\n".join(lines)
