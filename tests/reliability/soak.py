"""Random graphs over HTTP for as long as one likes, some interrupted, and what the server holds of them
afterwards."""

import json
import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from comfyui_nibble.tests.host.graphs import FLUX_TINY, load_graph, node, quantize_graph, sampling
from comfyui_nibble.tests.host.server import GraphError

H = 256
LORAS = ("bfl", "diffusers", "small", "dora")
FULL = node("UNETLoader", unet_name=FLUX_TINY["model"], weight_dtype="default")
CALIBRATION = {"samples": 2, "steps": 1}
# What a refused graph must say, and no other graph may.
REFUSALS = {
    "quantized twice": "this model is quantized already",
    "no such file": "value_not_in_list|Value not in list|not found",
    "no such block": "there is no block 9",
    "nothing to bake": "there is no LoRA on this model",
    "saved with a LoRA": "Nibble Bake LoRA",
    "full precision saved": "not quantized by Nibble",
}


@dataclass(frozen=True)
class Held:
    """What the server's process holds after /free. allocated: bytes of glibc's allocator in use; blocks: of
    Python's; files: of ours that are mapped."""

    allocated: int
    blocks: int
    descriptors: int
    maps: int
    files: int


@dataclass
class Soak:
    """Figures of a run. latents: {graph: what it sampled first}, which all later runs of the graph must give
    bit for bit. seconds: that each kind of graph took when it was last run to its end."""

    graphs: dict = field(default_factory=dict)
    interrupted: int = 0
    refused: int = 0
    repeated: int = 0
    held: list[Held] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    latents: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)

    def text(self, seconds: float) -> str:
        """The figures in lines for a person."""
        first, last = self.held[0], self.held[-1]
        mib = [h.allocated / 2**20 for h in self.held]
        return (
            f"{sum(self.graphs.values())} graphs in {seconds:.0f} s: "
            f"{', '.join(f'{k} {n}' for k, n in sorted(self.graphs.items()))}\n"
            f"{self.interrupted} interrupted, {self.refused} refused as they should be, "
            f"{len(self.unexpected)} unexpected errors\n"
            f"{self.repeated} latents the same as those of the graph before, bit for bit\n"
            f"allocated after /free {' '.join(f'{m:.2f}' for m in mib)} MiB; "
            f"Python's blocks {first.blocks} -> {last.blocks}, "
            f"descriptors {first.descriptors} -> {last.descriptors}, "
            f"maps {first.maps} -> {last.maps}, mapped model files {first.files} -> {last.files}"
        )


def prepare(server):
    """Writes the LoRAs and the two quantized files that the graphs load; returns the files' names."""
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g) * 0.05
    pair = lambda name, n, k, rank, a="lora_A", b="lora_B": {
        f"{name}.{a}.weight": rand(rank, k),
        f"{name}.{b}.weight": rand(n, rank),
    }
    bfl = pair("diffusion_model.double_blocks.0.img_attn.qkv", 3 * H, H, 8) | pair(
        "diffusion_model.single_blocks.1.linear2", H, 5 * H, 8
    )
    tensors = {
        "bfl": bfl,
        "diffusers": pair("transformer.transformer_blocks.0.attn.to_q", H, H, 8)
        | pair("transformer.single_transformer_blocks.0.proj_mlp", 4 * H, H, 8),
        "small": pair("diffusion_model.double_blocks.0.txt_mlp.2", H, 4 * H, 2),
        "dora": bfl | {"diffusion_model.double_blocks.0.img_attn.qkv.dora_scale": torch.ones(3 * H, 1)},
    }
    for name, found in tensors.items():
        save_file(found, server.base / "models" / "loras" / f"soak_{name}.safetensors")
    for method in ("svdquant_r", "convrot"):
        server.run(_quantized(method, 32, save=f"diffusion_models/soak_{method}"))
    return [f"soak_{method}_00001_.safetensors" for method in ("svdquant_r", "convrot")]


def _quantized(method, rank, save=None, calibrated=False):
    graph = quantize_graph(FLUX_TINY, method=method, sample_steps=1, prefix=save or "", **CALIBRATION)
    for name in (
        "full",
        "full_latent",
        "report",
        *(() if save else ("save",)),
        *(() if calibrated else ("calibrate", "prompts")),
    ):
        del graph[name]
    if not calibrated:
        del graph["quantize"]["inputs"]["calibration"]
    graph["quantize"]["inputs"] |= {"rank": rank, "gptq": calibrated}
    graph["out"] = graph.pop("quantized_latent")
    return graph


def _stack(graph, names, rng, loader="LoraLoaderModelOnly"):
    """The graph with LoRA loaders between its model and what reads it; the name of the last."""
    last = "load"
    for i, name in enumerate(names):
        graph[f"lora{i}"] = node(
            loader,
            model=[last, 0],
            lora_name=f"soak_{name}.safetensors",
            strength_model=rng.choice([1.0, 0.5, -0.7]),
        )
        last = f"lora{i}"
    graph["sample"]["inputs"]["model"] = [last, 0]
    return last


class Graphs:
    """Makes graphs by kind: a function of a random generator that returns (graph, pattern of the error it
    must end with, "" for none)."""

    def __init__(self, files):
        self.files = files
        self.kinds = [name.removeprefix("make_") for name in dir(self) if name.startswith("make_")]

    def make(self, kind, rng):
        """(graph, pattern of its error) of a kind."""
        made = getattr(self, f"make_{kind}")(rng)
        return made if isinstance(made, tuple) else (made, "")

    def _load(self, rng):
        return load_graph(FLUX_TINY, rng.choice(self.files), sample_steps=rng.choice([1, 2]))

    def make_load(self, rng):
        return self._load(rng)

    def make_lora(self, rng):
        graph = self._load(rng)
        _stack(graph, rng.sample(LORAS, rng.randint(1, 4)), rng)
        return graph

    def make_bypass(self, rng):
        graph = self._load(rng)
        _stack(graph, rng.sample(LORAS[:3], rng.randint(1, 2)), rng, "LoraLoaderBypassModelOnly")
        return graph

    def make_swap(self, rng):
        other = rng.choice([FULL, node("NibbleLoadDiffusionModel", model_name=rng.choice(self.files))])
        blocks = rng.choice(["double 0", "single 0-1", "*.mlp", "single 1"])
        swapped = node("NibbleSwapBlocks", model_a=["load", 0], model_b=["other", 0], blocks=blocks)
        return load_graph(FLUX_TINY, rng.choice(self.files), sample_steps=1, other=other, model=swapped)

    def make_quantize(self, rng):
        return _quantized(rng.choice(["rtn", "convrot", "svdquant"]), rng.choice([16, 32]))

    def make_calibrate(self, rng):
        return _quantized(rng.choice(["rtn", "convrot"]), 32, calibrated=True)

    def make_guard(self, rng):
        graph = _quantized("rtn", 32, calibrated=True)
        del graph["quantize"], graph["quantized"]
        return graph | {
            "packed": node("NibbleLoadDiffusionModel", model_name=self.files[0]),
            "guard": node("NibbleGuard", model=["load", 0], quantized=["packed", 0],
            calibration=["calibrate", 0], budget="quality (dB)",
                          quality_db=rng.choice([20.0, 24.0]), memory_mib=0.0, unit="layer", allow_w4a8=True,
                          allow_w8a8=True, allow_16_bit=True),
            "sample": sampling(["guard", 0], ["prompt", 0], ["latent", 0], steps=1),
            "out": node("SaveLatent", samples=["sample", 0], filename_prefix="guarded"),
        }  # fmt: skip

    def make_bake(self, rng):
        graph = self._load(rng)
        last = _stack(graph, rng.sample(LORAS[:3], 2), rng)
        graph["bake"] = node("NibbleBakeLora", model=[last, 0], rank=rng.choice([0, 40]))
        graph["save"] = node("NibbleSaveModel", model=["bake", 0], filename_prefix="diffusion_models/baked")
        graph["sample"]["inputs"]["model"] = ["bake", 0]
        return graph

    def make_save(self, rng):
        return self._load(rng) | {
            "save": node("NibbleSaveModel", model=["load", 0], filename_prefix="diffusion_models/saved")
        }

    def make_export(self, rng):
        export = node(
            "NibbleExportModel",
            model=["load", 0],
            format="native",
            filename_prefix="diffusion_models/out",
            lossy=True,
            replacement="int8",
        )
        return load_graph(FLUX_TINY, self.files[1], sample_steps=1) | {"export": export}

    def make_refused(self, rng):
        why = rng.choice(sorted(REFUSALS))
        graph, model = self._load(rng), ["load", 0]
        if why == "quantized twice":
            graph["x"] = node("NibbleQuantize", model=model, method="rtn", rank=0, gptq=False)
            graph["save"] = node("NibbleSaveModel", model=["x", 0], filename_prefix="diffusion_models/no")
        elif why == "no such file":
            graph["load"]["inputs"]["model_name"] = "nothing.safetensors"
        elif why == "no such block":
            graph["x"] = node("NibbleSwapBlocks", model_a=model, model_b=["full", 0], blocks="single 9")
            graph |= {
                "full": FULL,
                "save": node("NibbleSaveModel", model=["x", 0], filename_prefix="diffusion_models/no"),
            }
        elif why == "nothing to bake":
            graph["x"] = node("NibbleBakeLora", model=model, rank=0)
            graph["save"] = node("NibbleSaveModel", model=["x", 0], filename_prefix="diffusion_models/no")
        elif why == "saved with a LoRA":
            graph["save"] = node(
                "NibbleSaveModel",
                model=[_stack(graph, ["bfl"], rng), 0],
                filename_prefix="diffusion_models/no",
            )
        else:
            graph |= {
                "full": FULL,
                "save": node("NibbleSaveModel", model=["full", 0], filename_prefix="diffusion_models/no"),
            }
        return graph, REFUSALS[why]


def held(server) -> Held:
    """What the server's process holds once /free has been done: it is done when memory stops falling.
    ComfyUI's history of prompts is cleared before, which grows by 16 kB a graph."""
    server.post("/history", {"clear": True})
    server.post("/free", {"unload_models": True, "free_memory": True})
    process, before = Path(f"/proc/{server.process.pid}"), None
    for _ in range(40):
        time.sleep(0.25)
        now = server.get("/test/heap")
        if before is not None and abs(now["allocated"] - before["allocated"]) < 2**16:
            break
        before = now
    maps = (process / "maps").read_text().splitlines()
    ours = {line.split()[-1] for line in maps if str(server.base) in line}
    descriptors = len(list((process / "fd").iterdir()))
    return Held(now["allocated"], now["blocks"], descriptors, len(maps), len(ours))


def run_one(server, soak: Soak, kind: str, graph: dict, error: str, share: float | None = None):
    """Runs a graph, interrupted after such a share of what its kind takes if asked, and takes down what came
    of it."""
    soak.graphs[kind] = soak.graphs.get(kind, 0) + 1
    started = time.monotonic()
    try:
        prompt = server.submit(graph)
        if share is not None:
            time.sleep(share * soak.seconds.get(kind, 0.5))
            server.post("/interrupt")
        outputs = server.wait(prompt, timeout=300)["outputs"]
    except GraphError as found:
        if share is not None and "interrupted at" in str(found):
            soak.interrupted += 1
        elif error and re.search(error, str(found)):
            soak.refused += 1
        else:
            soak.unexpected.append(f"{kind}: {str(found)[:500]}")
        return
    soak.seconds[kind] = time.monotonic() - started
    if error:
        soak.unexpected.append(f"{kind}: expected an error with {error!r}, found none")
        return
    key, latents = json.dumps(graph, sort_keys=True), server.latents(outputs, "out")
    if not torch.isfinite(latents).all():
        soak.unexpected.append(f"{kind}: latents with NaN or Inf")
    if (first := soak.latents.setdefault(key, latents)) is not latents:
        soak.repeated += 1
        if not torch.equal(first, latents):
            soak.unexpected.append(f"{kind}: latents differ from those of the same graph before")


def references(files, rng) -> list[dict]:
    """Graphs that are run again and again: each file plain, and with two LoRAs."""
    plain = [load_graph(FLUX_TINY, file, sample_steps=1) for file in files]
    with_loras = load_graph(FLUX_TINY, files[0], sample_steps=1)
    _stack(with_loras, ["bfl", "diffusers"], rng)
    return [*plain, with_loras]


def run(server, count: int, seed: int = 0, every: int = 10, warm_up: int = 1) -> Soak:
    """One graph of each kind, `warm_up` times, then `count` random ones, one in four interrupted; /free and
    references after each `every`."""
    rng, soak, files = random.Random(seed), Soak(), prepare(server)
    graphs = Graphs(files)
    fixed = references(files, rng)
    soak.seconds["refused"] = 0.1
    for kind in graphs.kinds * warm_up:
        run_one(server, soak, kind, *graphs.make(kind, rng))
    for graph in fixed:
        run_one(server, soak, "reference", graph, "")
    soak.held.append(held(server))
    for i in range(count):
        kind = rng.choice(graphs.kinds)
        graph, error = graphs.make(kind, rng)
        run_one(server, soak, kind, graph, error, rng.uniform(0, 1) if rng.random() < 1 / 4 else None)
        if (i + 1) % every == 0 or i + 1 == count:
            for graph in fixed:
                run_one(server, soak, "reference", graph, "")
            soak.held.append(held(server))
    return soak


def left_over(server, scratch: Path) -> list[str]:
    """Temporary files below the server's folder and in `scratch`, its TMPDIR. A stopped quantization keeps
    its finished blocks, and goes on with them: its folder is none, what is temporary in it is."""
    found = [
        p
        for folder in (server.base / "output", server.base / "models", server.base / "temp")
        for p in folder.rglob("*")
    ]
    names = re.compile(r"^\.?tmp\w*$|[.-]tmp$|^\.tmp|^\.nibble|-lock$|-run$")
    return sorted(str(p.relative_to(server.base)) for p in found if names.search(p.name)) + sorted(
        p.name for p in scratch.rglob("*.safetensors")
    )
