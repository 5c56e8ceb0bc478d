"""Times of whole layers predicted from the model of one multiprocessor, beside those of 16-bit products."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from .....kernels import spec_at_load
from .....kernels.operator.codes import NVFP4
from .....kernels.plan import FP4
from .....kernels.target import MIN_INT4, Target, triton_version
from ..cases import FLUX_TOKENS, RANK
from . import kernels, machine_code
from .multiprocessor import MEMORY, Modelled, modelled, products_of
from .sass import inner_loops
from .throughput import Throughput

GRAINS = ("group", "channel", NVFP4)
SIZES = ((3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288))


@dataclass(frozen=True)
class Loop:
    """A kernel's loop on a card, with as many blocks on a multiprocessor as fit. warps: of a block.
    outside: instructions of a warp in front of and behind it. codes: of a row that an iteration multiplies,
    0 for a quantizer."""

    body: tuple
    warps: int
    resident: int
    outside: int
    codes: float
    registers: int

    def model(self, card: Throughput, blocks: int | None = None) -> Modelled:
        return _model(self.body, card, self.warps, blocks or self.resident)

    def cycles(self, card: Throughput, blocks: int, steps: float) -> float:
        """Of `blocks` blocks of so many steps each, on all multiprocessors: whole rounds, then a last one
        with fewer blocks on each. A block waits for memory where it begins and where it ends."""
        rounds, rest = divmod(blocks, card.multiprocessors * self.resident)
        one = lambda n: steps * self.model(card, n).cycles + self.outside * self.warps * n / 4 + 4 * MEMORY
        total = rounds * one(self.resident)
        return total + (one(ceil(rest / card.multiprocessors)) if rest else 0.0)


@lru_cache(maxsize=256)
def _model(body, card, warps, blocks) -> Modelled:
    # Long bodies settle in few iterations.
    return modelled(body, card, warps, blocks, iterations=max(2, min(6, 3000 // len(body))))


def resident(card: Throughput, registers: int, shared: int, warps: int) -> int:
    """Blocks that fit a multiprocessor: 65536 registers in units of 256 a warp, shared memory with 1 KiB a
    block for the system, warps, and 16 blocks."""
    of_warp = ceil(registers * 32 / 256) * 256
    fits = 65536 // (of_warp * warps), card.shared_kib * 1024 // (shared + 1024), card.warps // warps, 16
    return max(1, min(fits))


def loops_of(binary: machine_code.Binary, card: Throughput, warps: int, area: int = 0, passes: int = 1):
    """The `passes` inner loops with the most products, as `Loop`. area: rows x columns of a product's
    tile."""
    code = binary.code
    spans = inner_loops(code)[:passes]
    blocks = resident(card, binary.registers, binary.shared, warps)
    outside = len(code.instructions) - sum(b - a for a, b in spans)
    found = []
    for span in spans:
        body = code.executed(span)
        macs = sum(products_of(i.op) for i in body if area and "MMA" in i.kind and i.kind != "HMMA")
        codes = macs * warps / area if area else 0
        found.append(Loop(body, warps, blocks, outside // len(spans), codes, binary.registers))
    return found


def target_of(card: Throughput) -> Target:
    return Target("cuda", card.arch, triton_version() or MIN_INT4)


@dataclass(frozen=True)
class Layer:
    """One layer's prediction, times in seconds. limit: of the product. bound: the quantizer's time at the
    bandwidth of memory. peak: the share of the tensor cores' peak that the product reaches as a whole,
    loop: in its main loop."""

    grain: str
    runs_as: str
    n: int
    k: int
    product: float
    quantizer: float
    bound: float
    half: float
    limit: str
    peak: float
    loop: float

    @property
    def ratio(self) -> float:
        return self.half / (self.product + max(self.quantizer, self.bound))


def compiled(job: kernels.Compilation) -> machine_code.Binary:
    return machine_code.disassembled(machine_code.built(*job.arguments))


def predict(card: Throughput, grain: str, n: int, k: int, m: int = FLUX_TOKENS, compiler=compiled) -> Layer:
    """SVDQuant's layer of rank 32 on m tokens with the card's default tiles. compiler: from a Compilation to
    a Binary."""
    target, spec = target_of(card), kernels.spec_of(grain, n, k, RANK)
    stored, spec = spec, spec_at_load(spec, target)
    problem = kernels.problem_of(target, spec, m)
    tile = kernels.tile_of(target, problem)
    (loop,) = loops_of(compiler(kernels.product(target, problem, tile)), card, tile.warps, tile.bm * tile.bn)
    codes = card.fp4 if problem.kernel == FP4 else card.int4 if problem.planes == 0 else card.int8
    seconds = 1e-9 / card.clock
    blocks = ceil(m / tile.bm) * ceil(n / tile.bn)
    model = loop.model(card)
    computing = seconds * loop.cycles(card, blocks, ceil(k / loop.codes))
    traffic = _tile_bytes(problem, tile, k) * blocks
    from_l2, memory = traffic / card.l2, (m * k * _code_bytes(problem) + n * k / 2 + 2 * m * n) / card.memory
    product = max(computing, from_l2, memory)
    limit = model.limit if product == computing else "L2" if product == from_l2 else "memory"
    quantizer, bound = _quantizing(card, target, spec, m, compiler)
    flops = 2 * m * n * k
    return Layer(
        grain,
        "W8A8" if spec is not stored else "W4A4",
        n,
        k,
        product,
        quantizer,
        bound,
        flops / card.half / card.cublas,
        limit,
        flops / product / card.peak(codes),
        model.tensor,
    )


def _code_bytes(problem) -> float:
    """Of x, a channel and token."""
    return 1 if problem.planes else 0.5


def _tile_bytes(problem, tile, k: int) -> float:
    """What a block reads through the L2: codes of its rows and columns, and scales of groups."""
    weights = 1 if problem.planes == 1 else 0.5
    scales = (4 * tile.bm + 2 * tile.bn) / 64 if problem.scales == 2 else 0.0
    if problem.kernel == FP4:
        scales = (tile.bm + tile.bn) / 16
    return k * (tile.bm * _code_bytes(problem) + tile.bn * weights + scales)


def _quantizing(card, target, spec, m, compiler) -> tuple[float, float]:
    """(modelled, at the bandwidth of memory) seconds of the activation quantizer of a layer."""
    (part,) = spec.parts
    act, grouped = part.activation, part.activation.granularity == "group"
    planes = kernels.lower(spec, target)[0].planes
    if part.grid == NVFP4:  # twice over x: the scale of a token comes first
        grouped, job = False, kernels.fp4_quantizer(target, 2, 16, act.either, spec.rank, 0, 0, True, 0)
    else:
        job = kernels.quantizer(target, spec.rank, 0, 0, True, grouped, act.bits, False, planes)
    settings, warps = job.constants, job.options["num_warps"]
    loops = loops_of(compiler(job), card, warps, passes=1 if grouped else 2)
    blocks = ceil(m / settings["BM"])
    steps = ceil(part.width / (64 * settings["TILES"]))
    cycles = sum(loop.cycles(card, blocks, steps) for loop in loops)
    scales = 4 * m * (part.width // 64 if grouped else 1)
    if part.grid == NVFP4:
        scales += m * part.width // 16
    moved = (
        m * part.width * (2 + (1 if planes else 0.5)) + scales + 2 * m * (spec.rank if settings["RP"] else 0)
    )
    return 1e-9 / card.clock * cycles, moved / card.memory


def text(card: Throughput, layers) -> str:
    """The table of a card's layers."""
    lines = [
        f"Prediction for {card.name} (sm_{card.arch}) from machine code and public throughputs: nothing was "
        "measured.",
        f"{FLUX_TOKENS} tokens, rank {RANK}; microseconds; 16 bit: {card.half / 1e12:.0f} TFLOP/s at "
        f"{card.cublas:.0%}; memory {card.memory / 1e9:.0f} GB/s; L2 {card.l2 / 1e12:.1f} TB/s, assumed.",
        f"{'scales':8} {'runs as':8} {'N x K':13} {'product':>8} {'of peak':>8} {'loop':>6} "
        f"{'quantizer':>10} {'by memory':>10} {'16 bit':>7} {'ratio':>6}  limit",
    ]
    for one in layers:
        us = lambda seconds: f"{1e6 * seconds:.0f}"
        lines.append(
            f"{one.grain:8} {one.runs_as:8} {f'{one.n} x {one.k}':13} {us(one.product):>8} {one.peak:>8.0%} "
            f"{one.loop:>6.0%} {us(one.quantizer):>10} {us(one.bound):>10} {us(one.half):>7} "
            f"{one.ratio:>6.2f}  {one.limit}"
        )
    return "\n".join(lines)


def run(name: str, echo) -> None:
    """Prints the table of the card of this name."""
    from .throughput import card_named

    card = card_named(name)
    compiler = remembering()
    grains = [grain for grain in GRAINS if grain != NVFP4 or card.fp4]
    echo(text(card, [predict(card, grain, n, k, compiler=compiler) for grain in grains for n, k in SIZES]))


def remembering(compiler=compiled):
    """`compiler`, that compiles what differs only in sizes once."""
    known: dict[str, machine_code.Binary] = {}

    def one(job):
        key = repr(job)
        if key not in known:
            known[key] = compiler(job)
        return known[key]

    return one
