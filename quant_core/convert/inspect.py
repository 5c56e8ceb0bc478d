"""What a file is and holds, from its header alone."""

from math import prod
from pathlib import Path

import torch

from ...kernels import paths_of
from ...kernels.operator.errors import MESSAGE, plain, shortened
from ...kernels.target import target_of
from ..calibration.file import Calibration
from ..charts.sheet import drawn
from ..charts.summary import headline
from ..families import by_name
from ..formats.checkpoint import Checkpoint
from ..formats.detect import CALIBRATION, FULL, kind_of, open_quantized
from ..formats.kitchen.declared import BLOCKS
from ..formats.kitchen.native import losses
from ..formats.kitchen.read import KitchenFile
from ..formats.nibble import PackFile
from ..formats.opened import Opened
from ..layer.memory import predict
from ..layer.row import Row
from ..run.chart import chart
from ..run.report import as_report, bits_per_weight, file_storage, left_overs, whole
from ..run.unquantized import kept_rows
from ..run.verdict import Verdict, verdict
from ..store import digests
from ..store.progress import Progress, silent
from ..store.safe import open_safetensors

BY_MAKER = "left so by who made the file"
USUAL_BITS = 4.6  # of svdquant_r at rank 32, all side data counted, at FLUX's widths


def describe(path: Path, device: str | torch.device | None = None) -> dict:
    """A JSON-able description of a quantized model of any format that the pack reads, a full-precision one,
    or a calibration.

    device: whose kernels and memory are meant; the machine's own if not given. Raises CheckpointError,
    CalibrationError or UnknownArchitecture, each naming the file.
    """
    path, target = Path(path), target_of(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = kind_of(path)
    if kind == CALIBRATION:
        calibration = Calibration(path)
        own = {"kind": "calibration", "hash": calibration.hash, "inputs": len(calibration.names)}
        return own | {key: value for key, value in calibration.meta.items() if key not in own}
    if kind == FULL:
        return _full(Checkpoint(path), target)
    return _quantized(open_quantized(path), target)


def brief(path: Path, device: str | torch.device | None = None) -> tuple[Verdict, list[str]]:
    """(the Verdict, three short lines on what it is, the memory it takes and where it came from) of a
    quantized model, from its header. Raises as `open_quantized` does."""
    model = open_quantized(path)
    rows = [Row.from_json(row) for row in model.report or as_report(model)]
    made, title = model.provenance, by_name(model.family).title
    from ..methods import METHODS  # only the node shows it; `nibble inspect` reads a header without what fits

    method = METHODS[made["method"]].title if made.get("method") in METHODS else model.kind
    bits = f"{bits_per_weight(rows):.1f} bits a weight, {len(model.specs)} layers quantized"
    target = target_of(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    memory = predict(model.specs, model.rest_bytes(), target)
    return verdict(rows, model.logical_shapes()), [
        f"{title}, {method}, {bits}",
        memory.short(),
        _came_from(made),
    ]


def _came_from(made) -> str:
    """One line of a provenance, which may be anybody's."""
    own, source, calibration = (
        found if isinstance(found := made.get(key), dict) else {}
        for key in ("my_card", "source", "calibration")
    )
    file = own.get("of") or source.get("file") or (f"model {made['model']}" if made.get("model") else "")
    said = [
        f"From {file}" if file else "Of unknown origin",
        f"wish {own['wish']}" if own.get("wish") else "",
        f"{calibration['samples']} example runs" if calibration.get("samples") else "",
        f"Nibble {made['nibble']}" if made.get("nibble") else "",
    ]
    return shortened(plain(", ".join(filter(None, said))), MESSAGE)


def picture_of(path: Path, device: str | torch.device = "cpu") -> tuple[torch.Tensor, list[str]]:
    """(a map of the layers of a quantized model (1, H, W, 3), fp32 in [0, 1], lines where it could not be
    drawn); of another file a sentence. Raises what `describe` does."""
    path = Path(path)
    if kind_of(path) in (CALIBRATION, FULL):
        return drawn([headline(path.name, "Not a quantized model: there is no map of its layers.")])
    model = open_quantized(path)
    rows = [Row.from_json(row) for row in model.report or as_report(model)]
    rows += kept_rows(model.logical_shapes(), by_name(model.family), rows, otherwise=BY_MAKER)
    paths, _ = paths_of(model.specs, target_of(device))
    return chart(rows, model.logical_shapes(), path.name, paths)


def verified(path: Path, progress: Progress = silent) -> str:
    """A sentence for a file, or a folder of them, whose tensors all agree with their hashes. Raises
    CheckpointError naming those that do not, ValueError for a file without hashes."""
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    sizes = {file: digests.verify(file, open_safetensors(file), progress=progress) for file in files}
    if without := [file for file, size in sizes.items() if size < 0]:
        raise ValueError(
            f"{without[0]}: has no hashes to compare with: it was not written by Nibble 0.7 or later."
        )
    return (
        f"{path}: {sum(sizes.values()) / 1e6:,.1f} MB in {len(files)} files, every tensor as it was written"
    )


def _full(checkpoint: Checkpoint, target) -> dict:
    layers = checkpoint.family.layers(checkpoint.shapes)
    rows = [
        Row(
            x.name,
            x.block,
            x.in_features,
            x.out_features,
            "",
            nbytes=round(x.in_features * x.out_features * USUAL_BITS / 8),
        )
        for x in layers
    ]
    kept = kept_rows(checkpoint.shapes, checkpoint.family, rows)
    held = 2 * sum(map(prod, checkpoint.shapes.values())) - checkpoint.saved
    return {
        "kind": "checkpoint below 16 bit" if checkpoint.reduced else "full-precision checkpoint",
        **({"below 16 bit": checkpoint.reduced} if checkpoint.reduced else {}),
        "family": checkpoint.family.title,
        "files": len(checkpoint.files),
        "model": checkpoint.fingerprint(),
        "tensors": len(checkpoint.shapes),
        "blocks": len({layer.block for layer in layers}),
        "quantizable layers": len(layers),
        "quantized with a calibration": f"{whole(rows, checkpoint.shapes)}, at {USUAL_BITS} bits a weight",
        "left-overs": left_overs(kept, checkpoint.shapes),
        "stock ComfyUI": "loads it" if checkpoint.family.comfyui else "has no such model",
        "memory": predict({}, held, target).lines(),
    }


def _quantized(model: Opened, target) -> dict:
    weights = sum(s.in_features * s.out_features for s in model.specs.values())
    rows = {row["name"]: row for row in model.report}
    error = lambda name: (
        f", {rows[name]['sqnr_db']:.1f} dB" if rows.get(name, {}).get("sqnr_db") is not None else ""
    )
    kernels, why = paths_of(model.specs, target)
    shapes, quantized = model.logical_shapes(), [Row(**row) for row in as_report(model)]
    beside = kept_rows(shapes, by_name(model.family), quantized, otherwise=BY_MAKER)
    kept = [Row.from_json(row) for row in model.report if not row["nbytes"]]
    kept += [row for row in beside if row.name not in {r.name for r in kept}]
    out = {
        "kind": model.kind,
        "family": by_name(model.family).title,
        "file bytes": sum(f.stat().st_size for f in model.path.glob("*.safetensors"))
        if model.path.is_dir()
        else model.path.stat().st_size,
        "quantized layers": len(model.specs),
        "quantized": whole(quantized, shapes),
    }
    if model.report:
        out["block bits per weight"] = round(8 * sum(r["nbytes"] for r in model.report) / max(1, weights), 3)
    if isinstance(model, PackFile):
        out["storage"] = file_storage(model)
    return out | {
        "left in 16 bit": [name for name, row in rows.items() if not row["nbytes"] and row["block"]],
        "left-overs": left_overs(kept, shapes),
        "stock ComfyUI": _stock(model),
        "notes": list(model.notes),
        "provenance": model.provenance,
        "memory": predict(model.specs, model.rest_bytes(), target).lines(),
        "runs on this machine": why,
        "layers": {
            name: f"{spec.describe()}{error(name)}, {kernels[name]}" for name, spec in model.specs.items()
        },
    }


def _stock(model: Opened) -> str:
    if not isinstance(model, KitchenFile):
        exact = len(model.specs) - len(losses(model.specs))
        return (
            f"cannot load it; `nibble convert --to native` keeps {exact} of {len(model.specs)} quantized "
            "layers as they are"
        )
    # What it was declared as, ComfyUI reads whatever it has become here.
    read = {name for name, found in model.formats.items() if found in BLOCKS}
    found = [name for name in losses(model.specs) if name not in read]
    return (
        f"cannot load {len(found)} layers, such as {found[0]}"
        if found
        else "loads it with Load Diffusion Model"
    )


def description_text(found: dict) -> str:
    """A description as lines, the layers last and indented. Names and texts of the file have no control
    characters here, and are cut."""
    lines, shown = [], lambda value: shortened(plain(str(value)), MESSAGE)
    for key, value in found.items():
        if key == "layers" and isinstance(value, dict):
            lines += [f"  {shortened(plain(name))}: {shown(what)}" for name, what in value.items()]
        elif isinstance(value, list) and value and len(value) <= 12:
            lines += [
                f"{shown(key)}: {shown(value[0])}",
                *(" " * (len(key) + 2) + shown(line) for line in value[1:]),
            ]
        elif value not in ([], {}):
            lines.append(f"{shown(key)}: {shown(value)}")
    return "\n".join(lines)
