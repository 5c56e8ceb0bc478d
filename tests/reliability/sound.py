"""Sound files of every kind that the pack reads, for what damages them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.calibration.file import save
from comfyui_nibble.quant_core.calibration.trajectory import Recorder
from comfyui_nibble.quant_core.cli.quantize import quantize_file
from comfyui_nibble.quant_core.convert import convert
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.detect import open_quantized
from comfyui_nibble.quant_core.layer.statistics import InputStatistics
from comfyui_nibble.quant_core.methods import by_name
from comfyui_nibble.tests.assets import nunchaku
from comfyui_nibble.tests.assets.synthetic import flux_shapes, random_state

METHODS = {"svdquant": False, "robuq": True, "splitquant": False, "convrot": False}  # and whether in base 3
INDEX = "model.safetensors.index.json"


def sound(folder: Path) -> dict[str, Path]:
    """{kind: file or folder} of sound files, all but the calibration of one small FLUX."""
    g = torch.Generator().manual_seed(0)
    state = random_state(flux_shapes(hidden=128, context=64, pooled=64))
    made = {
        "full": folder / "full.safetensors",
        "shards": folder / "shards",
        "calibration": folder / "calibration.safetensors",
    }
    save_file(state, made["full"], metadata={"format": "pt", "config": "{}"})
    _save_shards(made["shards"], state)
    for method, base3 in METHODS.items():
        made[method] = folder / f"{method}.safetensors"
        chosen = by_name(method)
        quantize_file(made["full"], made[method], chosen, chosen.config, base3=base3)
    for kind, method in (("native", "convrot"), ("kitchen", "svdquant")):
        made[kind] = folder / f"{kind}.safetensors"
        convert.convert(convert.plan(open_quantized(made[method]), kind), made[kind], lossy=True)
    made["nunchaku"] = nunchaku.write(folder, nunchaku.flux().file, name="nunchaku.safetensors")
    fp4 = nunchaku.flux(fp4=True).file
    made["nunchaku_fp4"] = nunchaku.write(folder, fp4, nunchaku.FP4, "nunchaku_fp4.safetensors")
    statistics = {}
    for layer in Checkpoint(made["full"]).family.layers({k: tuple(t.shape) for k, t in state.items()})[:4]:
        width = layer.in_features
        s = statistics[layer.input] = InputStatistics.empty(layer.input, width, ((0, 64), (64, width)), 8)
        s.update(torch.randn(16, width, generator=g))
        s.hold_out(torch.randn(8, width, generator=g), torch.rand(8, generator=g, dtype=torch.float64), 0.5)
    recorder = Recorder()
    for step in range(2):
        recorder.add(
            0,
            1,
            step,
            0.5,
            True,
            (torch.randn(2, 3, generator=g),),
            {"guidance": 3.5, "y": {"c": torch.ones(1)}},
        )
    names = list(statistics)
    seen = {"order": names, "shared": {names[1]: names[0]}, "rows": dict.fromkeys(names, 16)}
    meta = {
        "model": Checkpoint(made["full"]).fingerprint(),
        "samples": 2,
        "done": 2,
        "passes": 1,
        "seed": 0,
        "observed": seen,
    }
    save(made["calibration"], statistics, meta, recorder)
    return made


def _save_shards(folder, state):
    folder.mkdir()
    names, where = sorted(state), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({k: state[k] for k in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
