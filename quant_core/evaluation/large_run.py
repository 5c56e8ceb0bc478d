"""What a calibration of FLUX.2 dev with 512 prompts and its quantization would take on 1 to 128 GPUs: a
prediction from figures of which each has its source. `python -m
comfyui_nibble.quant_core.evaluation.large_run` prints the figures and the table of docs/scale.md."""

from math import ceil, log2

from ..calibration.file import PIECE
from ..calibration.plan import Input, inputs_of, plan_passes, statistics_bytes
from ..calibration.replay import Span, worth
from ..cluster.simulate import Machine, Phase, Storage, Task, simulated
from ..diffusers_host.shards import SHARD
from ..families import Layer
from ..families.flux2 import FLUX2
from ..layer.moments import TILE
from ..run.layers import fitting_bytes

HIDDEN, DOUBLE, SINGLE = 6144, 8, 48  # of FLUX.2 dev
TEXT = 512  # tokens
TOKENS = 64 * 64 + TEXT  # of a picture of 1024 x 1024 with its text
PROMPTS, STEPS = 512, 12  # steps: what `nibble calibrate` takes if nothing is said
STATISTICS = 8 << 30  # --memory-gb 8: what the network leaves of 80 GB
HELD_OUT = 1 / 4  # of the samples, whose second moments are not taken

# FLUX.1 dev, 28 steps at 1024 x 1024 on one H100 in eager PyTorch, 6.71 s (docs/performance/flux.md of xDiT),
# are 28 x 74.4 TFLOP: 31 % of the 989 TFLOPS of bf16 without sparsity.
FLOPS = 0.31 * 989e12
TEXT_ENCODER = 48e9  # bytes: Mistral Small of 24 B weights in bf16
TO_GPU = 20e9  # bytes a second, assumed: pageable memory over PCIe 5.0 x16, whose peak is 64e9
CPUS, GPUS, MEMORY = 112, 8, 2e12  # a DGX H100
GIVEN = 0.95  # share of the memory that tasks get, by `ray start --memory`
RAYS_OWN = 0.7  # the share that Ray gives them if nothing is said
TOTAL, EACH = 40e9, 10e9  # bytes a second of the shared file system, and of one machine, assumed
START = 3.3  # seconds until a process of Ray has imported what a task needs, measured here
LOAD = 5e9  # bytes a second at which a process builds a pipeline from the page cache, assumed
MERGE = 0.7e9  # bytes of statistics a second that a thread adds up, measured here
BITS = 4.5  # a weight, all side data counted
# {(out, in): CPU seconds of a fit with svdquant_r on one thread of an AMD EPYC (Zen 3)}, measured here on
# synthetic tokens, but for the widest: one in a line through the two below, one the sum of its two parts.
FITS = {
    (6144, 6144): 30.2,
    (18432, 6144): 85.5,
    (36864, 6144): 151.5,
    (55296, 6144): 151.5 + (151.5 - 85.5),
    (6144, 18432): 103.0,
    (6144, 24576): 30.2 + 103.0,
}
WEIGHT_ONLY = 10.0  # of the modulation layers


def layers() -> list[Layer]:
    """The layers of FLUX.2 dev that are quantized."""
    shapes = {
        f"double_stream_modulation_{stream}.lin.weight": (6 * HIDDEN, HIDDEN) for stream in ("img", "txt")
    }
    shapes["single_stream_modulation.lin.weight"] = (3 * HIDDEN, HIDDEN)
    for block in range(DOUBLE):
        for stream in ("img", "txt"):
            for name, n, k in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.0", 6, 1), ("mlp.2", 1, 3)):
                shapes[f"double_blocks.{block}.{stream}_{name}.weight"] = n * HIDDEN, k * HIDDEN
    for block in range(SINGLE):
        shapes[f"single_blocks.{block}.linear1.weight"] = 9 * HIDDEN, HIDDEN
        shapes[f"single_blocks.{block}.linear2.weight"] = HIDDEN, 4 * HIDDEN
    return FLUX2.layers(shapes)


def phases() -> list[Phase]:
    """The run, phase by phase: each begins when the one before has ended."""
    plan = layers()
    return [_sampling(plan), _merging(plan), _fitting(plan), _writing(plan)]


def _sampling(plan) -> Phase:
    """A task a shard; a process loads the pipeline once, and a sample moves it to the GPU and back."""
    passes = passes_of(plan)
    flops = step_flops(plan) * replayed(passes) + (1 - HELD_OUT) * moments_flops(plan)
    pipeline = round(network_bytes(plan) + TEXT_ENCODER)
    seconds = SHARD * (STEPS * flops / FLOPS + 2 * pipeline / TO_GPU)
    size = sum(map(statistics_bytes, passes))
    tasks = [Task(seconds, memory=2 * pipeline + STATISTICS, writes=size)] * ceil(PROMPTS / SHARD)
    return Phase(
        "sampling",
        tasks,
        gpus=1,
        start=START + pipeline / LOAD,
        start_reads=pipeline,
    )


def _merging(plan) -> Phase:
    """A task a piece, which reads it of all shards."""
    shards, tasks = ceil(PROMPTS / SHARD), []
    for piece in plan_passes(inputs_of(plan), PIECE):
        size = statistics_bytes(piece)
        tasks.append(
            Task(shards * size / MERGE, round(size * (2 + log2(shards))), reads=shards * size, writes=size)
        )
    return Phase("merging", tasks)


def _fitting(plan) -> Phase:
    """A task a layer, on a CPU thread: nobody has timed fits on a GPU."""
    of = {i.name: i for i in inputs_of(plan)}
    tasks = [
        Task(
            WEIGHT_ONLY if layer.weight_only else FITS[layer.out_features, layer.in_features],
            memory=fitting_bytes(layer),
            reads=2 * weights(layer) + statistics_bytes([of[layer.input]]),
            writes=round(BITS / 8 * weights(layer)),
        )
        for layer in plan
    ]
    return Phase("fitting", tasks, start=START)


def _writing(plan) -> Phase:
    """One process reads the finished layers and writes them as a file."""
    size = round(BITS / 8 * sum(map(weights, plan)))
    return Phase("writing", [Task(0.0, reads=size, writes=size)])


def passes_of(plan: list[Layer]) -> list[list[Input]]:
    return plan_passes(inputs_of(plan), STATISTICS, whole_blocks=True)


def weights(layer: Layer) -> int:
    return layer.in_features * layer.out_features


def network_bytes(plan: list[Layer]) -> float:
    """In bf16. What is not quantized is 1 % of it."""
    return 2 * 1.01 * sum(map(weights, plan))


def step_flops(plan: list[Layer]) -> float:
    """Of all layers and of attention in one step."""
    products = sum(2.0 * seen_by(layer.name) * weights(layer) for layer in plan)
    return products + 4.0 * TOKENS**2 * HIDDEN * (DOUBLE + SINGLE)


def moments_flops(plan: list[Layer]) -> float:
    """Of the second moments of one step, upper triangles in tiles."""
    half = lambda width: sum(TILE * (width - start) for start in range(0, width, TILE))
    return sum(2.0 * seen_by(i.name) * half(b - a) for i in inputs_of(plan) for a, b in i.blocks)


def seen_by(name: str) -> int:
    """Tokens of a step that a layer sees: modulation reads one vector, and in two-stream blocks each stream
    has layers of its own."""
    if "modulation" in name:
        return 1
    return TOKENS if name.startswith("single") else TEXT if ".txt_" in name else TOKENS - TEXT


def replayed(passes: list[list[Input]]) -> float:
    """Samplings' worth of work of all passes, as `nibble calibrate` says it."""
    number = {name: at for at, name in enumerate(dict.fromkeys(i.block for group in passes for i in group))}
    at = [[number[i.block] for i in group] for group in passes]
    return worth([Span(min(group), max(group) + 1) for group in at], len(number))


def machines(gpus: int, given: float = GIVEN) -> list[Machine]:
    """Machines of 8 GPUs, or the share of one that goes with fewer. given: share of the memory for tasks."""
    share = min(1.0, gpus / GPUS)
    return [Machine(share * CPUS, share * GPUS, share * given * MEMORY)] * ceil(gpus / GPUS)


def minutes(phase: Phase, gpus: int, given: float = GIVEN) -> float:
    return simulated(phase, machines(gpus, given), Storage(TOTAL, EACH)).seconds / 60


def table(counts=(1, 8, 16, 32, 64, 128)) -> str:
    """Minutes of each phase by the number of GPUs, and the efficiency against the first row."""
    run = phases()
    lines = [
        "| GPUs | sampling | merging | fitting | writing | all | of a perfect speed-up |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    first = 0.0
    for gpus in counts:
        found = [minutes(phase, gpus) for phase in run]
        first = first or sum(found) * gpus
        cells = [f"{cell:.1f}" for cell in [*found, sum(found)]]
        lines.append(f"| {gpus} | {' | '.join(cells)} | {100 * first / gpus / sum(found):.0f} % |")
    return "\n".join(lines)


def main():
    plan = layers()
    passes, (sampling, *_) = passes_of(plan), phases()
    print(f"{sum(map(weights, plan)) / 1e9:.1f} B weights in {len(plan)} layers, {len(passes)} passes:")
    print(f"{replayed(passes):.2f} samplings' worth of work")
    print(
        f"a step: {step_flops(plan) / 1e12:.0f} TFLOP, and of second moments {moments_flops(plan) / 1e12:.0f}"
    )
    size = sum(map(statistics_bytes, passes))
    print(f"statistics: {size / 1e9:.1f} GB, of all shards {size * len(sampling.tasks) / 1e12:.1f} TB")
    print(f"a shard: {sampling.tasks[0]}")
    print(f"pieces of the merging: {len(plan_passes(inputs_of(plan), PIECE))}")
    print(
        f"sampling on 64 GPUs with Ray's own share of memory: {minutes(sampling, 64, RAYS_OWN):.1f} minutes"
    )
    print(f"\n{table()}")


if __name__ == "__main__":
    main()
