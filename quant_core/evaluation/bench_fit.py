"""`nibble bench-fit`: what it costs to fit layers of FLUX's sizes, in seconds, bits, dB and memory. Synthetic
data."""

import copy
import gc
import json
import threading
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch

from ..calibration.plan import HESSIAN_WIDTH, inputs_of
from ..families import FLUX, Layer, Part
from ..layer.chunks import power_db
from ..layer.linear import QuantizedLayer
from ..layer.problem import Problem, output_sqnr
from ..layer.row import Row
from ..layer.statistics import InputStatistics, hessian_blocks
from ..methods import Method, fit_problem
from ..run.report import bits_per_weight
from ..store.atomic import require_writable, save_text
from .inputs import KINDS, Kind

LAYERS = {
    "3072 x 3072": (3072, 3072, False),
    "9216 x 3072": (9216, 3072, False),
    "3072 x 12288 after GELU": (3072, 12288, True),
}


def tokens(count: int, width: int, seed: int, after_gelu: bool = False) -> torch.Tensor:
    """(count, width) correlated tokens with DiT-like outliers: log-normal channels, one in 64 at 40 times."""
    g, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(77)
    x = (
        torch.randn(count, width, generator=g)
        + torch.randn(count, 64, generator=g) @ torch.randn(64, width, generator=fixed) * 0.3
    )
    if after_gelu:
        return torch.nn.functional.gelu(x)
    factors = (0.5 * torch.randn(width, generator=fixed)).exp()
    factors[torch.randperm(width, generator=fixed)[: width // 64]] *= 40
    return x * factors


def statistics(layer: Layer, fit_tokens: int = 4096) -> InputStatistics:
    """Statistics of synthetic tokens for a layer's input."""
    out = InputStatistics.empty(
        layer.input,
        layer.in_features,
        hessian_blocks([(p.start, p.stop) for p in layer.parts], HESSIAN_WIDTH),
    )
    make = lambda count, seed: torch.cat(
        [tokens(count, p.stop - p.start, seed + p.start, p.after_gelu) for p in layer.parts], 1
    )
    for i in range(fit_tokens // 512):
        out.update(make(512, 1000 * (i + 1)))
    out.hold_out(
        make(1024, 1), torch.rand(1024, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 0.5
    )
    return out


def weight(layer: Layer, stats: InputStatistics) -> torch.Tensor:
    """A bf16 weight whose large in-channels are small where the activations are large, as in trained
    models."""
    rms = torch.cat([stats.hessians[b].diagonal() for b in stats.blocks]).div(stats.count).sqrt()
    g = torch.Generator().manual_seed(layer.out_features + layer.in_features)
    return (
        torch.randn(layer.out_features, layer.in_features, generator=g)
        / layer.in_features**0.5
        / rms.clamp(min=0.05)
    ).bfloat16()


class PeakMemory:
    """Peak resident memory of this process above its start, in bytes, sampled every 5 ms. Linux only; 0
    elsewhere."""

    def __enter__(self):
        gc.collect()
        self.start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.above = self.peak - self.start

    def _watch(self):
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now():
        try:
            return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        except OSError:
            return 0


def fit_layer(name: str, method: Method, device: str = "cpu") -> dict:
    """One layer of LAYERS: seconds, the way back to the CPU included, bits a weight, SQNR in dB on held-out
    tokens."""
    n, k, after_gelu = LAYERS[name]
    layer = Layer(name, "bench", k, n, (Part(0, k, after_gelu),), name)
    stats = statistics(layer)
    problem = Problem(
        layer, weight(layer, stats).to(device), torch.zeros(n, dtype=torch.bfloat16, device=device), stats
    )
    started = time.perf_counter()
    made = method.fit(problem, method.config).layer
    assert made is not None  # the methods that are timed quantize any layer
    made.to("cpu")
    seconds = time.perf_counter() - started
    return {
        "layer": name,
        "method": method.name,
        "seconds": seconds,
        "bits": made.bits_per_weight,
        "sqnr_db": output_sqnr(problem, made),
    }


@lru_cache(maxsize=len(KINDS))
def _of_kind(kind: str, make: Kind, k: int, n: int) -> tuple[Problem, torch.Tensor]:
    """(a layer of a kind, tokens (2048, K) fp32 to judge by). The tokens take longer than most fits."""
    x, held, judged = (
        make(count, k, torch.Generator().manual_seed(seed))
        for count, seed in ((8192, 21), (1024, 22), (2048, 23))
    )
    layer = Layer(kind, "bench", k, n, (Part(0, k, kind == "GELU"),), kind)
    stats = InputStatistics.empty(kind, k, hessian_blocks([(0, k)], HESSIAN_WIDTH))
    for rows in x.split(2048):
        stats.update(rows)
    stats.hold_out(
        held, torch.rand(1024, dtype=torch.float64, generator=torch.Generator().manual_seed(5)), 0.5
    )
    g = torch.Generator().manual_seed(9)
    rows = (0.3 * torch.randn(n, 1, generator=g)).exp()
    # Large where activations are small, as in trained models.
    made = torch.randn(n, k, generator=g) / k**0.5 * rows / x.square().mean(0).sqrt().clamp(min=0.05).sqrt()
    return Problem(layer, made.bfloat16(), None, stats), judged


def fit_kind(kind: str, method: Method) -> dict:
    """SQNR in dB of a layer whose inputs are of a kind of `inputs.KINDS`, on 2048 tokens that neither the fit
    nor its choices saw, and bits a weight."""
    kept, judged = _of_kind(kind, *KINDS[kind])
    # A fit uses up its second moments.
    problem = replace(kept, statistics=copy.deepcopy(kept.statistics))
    done = cast(QuantizedLayer, fit_problem(problem, method, method.config).layer)
    want = judged @ kept.weight.float().T
    noise = (done(judged) - want).double().square().sum().item()
    return {
        "inputs": kind,
        "method": method.name,
        "bits": done.bits_per_weight,
        "sqnr_db": power_db(want.double().square().sum().item(), noise),
    }


def kinds_text(results: list[dict]) -> str:
    """One line a kind of inputs, one column a method, in dB."""
    methods = list(dict.fromkeys(r["method"] for r in results))
    found = {(r["inputs"], r["method"]): r["sqnr_db"] for r in results}
    lines = [f"{'dB of the output':24}" + "".join(f"{m:>12}" for m in methods)]
    for kind in dict.fromkeys(r["inputs"] for r in results):
        lines.append(f"{kind:24}" + "".join(f"{found[kind, m]:12.2f}" for m in methods))
    return "\n".join(lines)


def fit_block(
    method: Method, device: str = "cpu", block: str = "single_blocks.0", hidden: int = 3072
) -> dict:
    """A whole FLUX block: seconds, bits, and the host's peak memory above the bf16 weights and the second
    moments it starts from."""
    shapes = {
        "linear1": (7 * hidden, hidden),
        "linear2": (hidden, 5 * hidden),
        "modulation.lin": (3 * hidden, hidden),
    }
    layers = FLUX.layers({f"{block}.{name}.weight": shape for name, shape in shapes.items()})
    stats = {
        i.name: statistics(next(layer for layer in layers if layer.input == i.name), 2048)
        for i in inputs_of(layers)
    }
    weights = {layer.name: weight(layer, stats[layer.input]) for layer in layers}
    block_bytes = sum(w.nbytes for w in weights.values())
    hessian_bytes = sum(h.nbytes for s in stats.values() for h in s.hessians.values())
    rows, started = [], time.perf_counter()
    with PeakMemory() as memory:
        for layer in layers:
            bias = torch.zeros(layer.out_features, dtype=torch.bfloat16, device=device)
            problem = Problem(layer, weights[layer.name].to(device), bias, stats.pop(layer.input))
            done = cast(QuantizedLayer, fit_problem(problem, method, method.config).layer).to("cpu")
            rows.append(
                Row(
                    layer.name,
                    block,
                    layer.in_features,
                    layer.out_features,
                    done.spec.describe(),
                    nbytes=done.nbytes,
                )
            )
            del problem
    return {
        "block": block,
        "method": method.name,
        "seconds": time.perf_counter() - started,
        "bits": bits_per_weight(rows),
        "block_bytes": block_bytes,
        "hessian_bytes": hessian_bytes,
        "peak_bytes_above_start": memory.above,
        # The start holds the bf16 block and H; the bound of the issue counts both.
        "peak_over_block": (memory.above + block_bytes) / block_bytes,
    }


def projected(results: list[dict], method: str) -> float:
    """Seconds to fit FLUX.1's 57 blocks: 38 times the one-stream block; 19 two-stream blocks, for each stream
    its qkv, projection and MLP and a modulation of 18432 x 3072, at the times of the layers, of wider ones in
    proportion."""
    of = {r["layer"]: r["seconds"] for r in results if r["method"] == method and "layer" in r}
    block = next(r["seconds"] for r in results if r["method"] == method and "block" in r)
    square, qkv, down = (of[name] for name in LAYERS)
    return 38 * block + 19 * 2 * (square + qkv * (1 + 12288 / 9216 + 18432 / 9216) + down)


def fitting_times_text(results: list[dict]) -> str:
    """One line a result, and one a method for all of FLUX.1."""
    lines = []
    for r in results:
        if "layer" in r:
            lines.append(
                f"{r['layer']:26}  {r['method']:10}  {r['seconds']:6.1f} s  {r['bits']:.3f} bits  "
                f"{r['sqnr_db']:6.2f} dB"
            )
        else:
            lines.append(
                f"{r['block']:26}  {r['method']:10}  {r['seconds']:6.1f} s  {r['bits']:.3f} bits  peak "
                f"memory {r['peak_over_block']:.2f} x "
                f"the block's {r['block_bytes'] / 2**20:.0f} MiB in bf16, beside "
                f"{r['hessian_bytes'] / 2**20:.0f} MiB of second moments"
            )
    for method in dict.fromkeys(r["method"] for r in results):
        lines.append(
            f"FLUX.1, 57 blocks, projected  {method:10}  {projected(results, method) / 60:.0f} minutes on "
            "this machine"
        )
    return "\n".join(lines)


def run(methods: list[Method], progress, out: Path | None = None, device: str = "cpu") -> list[dict]:
    """All layers and the block under each method; JSON into `out` where given."""
    if out is not None:
        require_writable(out)
    work = [(fit_layer, (name, m, device)) for m in methods for name in LAYERS] + [
        (fit_block, (m, device)) for m in methods
    ]
    results = [task(*args) for task, args in progress(work, len(work))]
    if out is not None:
        found = {
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "device": device,
            "results": results,
        }
        save_text(out, json.dumps(found, indent=1) + "\n")
    return results
