"""One step of a FLUX of 0.8 G weights in ComfyUI on this CPU: the full-precision file in stock ComfyUI and
Nibble files, side by side.

    python -m comfyui_nibble.tests.host.step --tokens 96 1024

Each file is loaded and run in a process of its own, one after the other, `--rounds` times in turn. Printed
are the median of a step in seconds of wall clock and of all cores together, which busy neighbours do not
change, the peak of resident memory, and the distance of the prediction from full precision. Needs a ComfyUI
at `$COMFYUI_PATH`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HIDDEN, DOUBLE, SINGLE = 3072, 1, 3
METHODS = {"svdquant": {"gptq": False, "iterations": 0}, "convrot": {}}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[96, 1024])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="Where the files are made, and kept.")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        print(json.dumps(measured(args.run, args.tokens, args.steps)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        files = made(args.folder or Path(temporary))
        found = {name: [] for name in files}
        for _ in range(args.rounds):
            for name, path in files.items():
                found[name].append(in_a_process(path, args))
        print(table(found, files, args.tokens))


def made(folder: Path) -> dict[str, Path]:
    """{name: file}, those that are missing made: random weights in bf16, and quantized without data."""
    import torch

    from comfyui_nibble.quant_core.cli.quantize import quantize_file
    from comfyui_nibble.quant_core.methods import by_name
    from comfyui_nibble.tests.assets.synthetic import flux_shapes, save_random

    torch.manual_seed(0)
    full = folder / "full.safetensors"
    if not full.exists():
        save_random(full, flux_shapes(DOUBLE, SINGLE, HIDDEN))
    files = {"stock, bf16 file": full}
    for method, options in METHODS.items():
        files[f"Nibble, {method}"] = path = folder / f"{method}.safetensors"
        if not path.exists():
            chosen = by_name(method)
            quantize_file(full, path, chosen, chosen.configured(**options))
    return files


def in_a_process(path: Path, args) -> dict:
    command = [sys.executable, "-m", "comfyui_nibble.tests.host.step", "--run", path]
    command += ["--steps", args.steps, "--tokens", *args.tokens]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(path: Path, tokens: list[int], steps: int) -> dict:
    """Seconds of the steps and the mean prediction, by tokens; MiB of resident memory at the peak."""
    from comfyui_nibble.tests.host.server import find_comfyui

    sys.path.append(str(find_comfyui()))
    from comfy.cli_args import args

    args.cpu = True
    import comfy.model_management
    import comfy.sd
    import torch

    from comfyui_nibble.nodes.host.build import load

    started = time.perf_counter()
    stock = path.name == "full.safetensors"
    patcher = comfy.sd.load_diffusion_model(str(path)) if stock else load(path)
    comfy.model_management.load_models_gpu([patcher])
    out = {"load_s": time.perf_counter() - started, "loaded_mib": peak_mib(), "steps": {}, "y": {}}
    for count in tokens:
        x, t, context, kwargs = inputs(count)
        seconds = []
        with torch.inference_mode():
            for _ in range(steps + 1):
                started = time.perf_counter(), time.process_time()
                y = patcher.model.apply_model(x, t, c_crossattn=context, **kwargs)
                seconds.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        out["steps"][count], out["y"][count] = seconds[1:], y.flatten()[::7].tolist()[:4096]
    return out | {"peak_mib": peak_mib()}


def inputs(tokens: int):
    """Three quarters of the tokens from the picture, one from the text."""
    import torch

    g = torch.Generator().manual_seed(tokens)
    rows = max(2, int((tokens * 3 // 4) ** 0.5))
    columns = tokens * 3 // 4 // rows
    text = tokens - rows * columns
    x = torch.randn(1, 16, 2 * rows, 2 * columns, generator=g)
    kwargs = {"y": torch.randn(1, 768, generator=g), "guidance": torch.full((1,), 3.5)}
    return x, torch.tensor([0.7]), torch.randn(1, text, 4096, generator=g), kwargs


def peak_mib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(found: dict, files: dict, tokens: list[int]) -> str:
    """A line a file: size, seconds to load, peak of memory; for each number of tokens seconds a step (wall,
    all cores), how many times faster than the first file, and the prediction's distance from its."""
    import torch

    stock = next(iter(found))
    seconds = lambda name, count, i: median(s[i] for run in found[name] for s in run["steps"][str(count)])
    y = lambda name, count: torch.tensor(found[name][0]["y"][str(count)])
    lines = [f"{'':22}{'file':>10}{'load':>8}{'peak':>10}" + "".join(f"{f'{c} tokens':>46}" for c in tokens)]
    for name, runs in found.items():
        line = f"{name:22}{files[name].stat().st_size / 2**20:>6.0f} MiB"
        line += f"{median(r['load_s'] for r in runs):>6.1f} s{max(r['peak_mib'] for r in runs):>6.0f} MiB"
        for count in tokens:
            far = (y(name, count) - y(stock, count)).norm() / y(stock, count).norm()
            wall, cores = (seconds(name, count, i) for i in range(2))
            line += f"{wall:>10.2f} s ({seconds(stock, count, 0) / wall:.2f}x)"
            line += f"{cores:>6.2f} cores' s ({seconds(stock, count, 1) / cores:.2f}x)  off {far:.3f}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
