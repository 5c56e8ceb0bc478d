"""What `nibble bench` measures on a machine, the most important first: a run may end at any case."""

from dataclasses import dataclass, replace

from ....kernels.target import Target
from ....kernels.tuning import candidates
from . import cases as layers
from .answers import Case
from .baselines import KITCHEN, TORCH
from .cases import LORA_RANK, Column
from .model import Size
from .ours import refusal
from .tune import problem_of, text_of, tuned_columns

CEILINGS = ("bf16_flops", "int8_flops", "bytes_per_s")
FITTED = ("svdquant_r", "svdquant")
# Of a model in 16 bit with its activations on a card: 24 GB and some. Below that a quarter of the blocks is
# stepped through, in 16 bit and in ours.
WHOLE_MODEL_BYTES = 30e9
CPU_LAYERS = ((3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288))
CPU_TOKENS = (1024, 96)
# On a CPU, one with 0.8 G weights in its blocks; an eighth of its tokens are text.
WHOLE_MODEL, CPU_MODEL = Size(), Size(double=1, single=3)


@dataclass(frozen=True)
class Sizes:
    """The layers that are measured; made smaller by tests."""

    quick: tuple[layers.Case, ...] = layers.QUICK
    full: tuple[layers.Case, ...] = layers.FULL
    tiny: tuple[layers.Case, ...] = layers.TINY
    model: Size = WHOLE_MODEL
    cpu_model: Size = CPU_MODEL
    cpu_layers: tuple[tuple[int, int], ...] = CPU_LAYERS
    cpu_tokens: tuple[int, ...] = CPU_TOKENS


def planned(target: Target, memory_bytes: int, everything: bool, sizes: Sizes | None = None) -> list[Case]:
    """All cases of a card; of a CPU those that a CPU can do. everything: beyond correctness, the model's step
    and the pack's own layers on a CPU."""
    sizes = sizes or Sizes()
    found = (
        _on_cpu(sizes, everything)
        if target.backend == "cpu"
        else _on_card(target, memory_bytes, everything, sizes)
    )
    seen: dict[str, Case] = {}
    for case in found:
        seen.setdefault(case.id, case)
    return list(seen.values())


def _on_card(target, memory_bytes, everything, sizes):
    columns = layers.columns(target)
    model_columns = [c for c in columns if c.kind == "operator" and not c.int8]
    yield from (Case(f"ceiling {name}", "ceiling", {"name": name}) for name in CEILINGS)
    yield from _checks(sizes.quick, model_columns, target)
    yield host(target)
    yield from _models(sizes.model, memory_bytes)
    if not everything:
        return
    yield from _layers(sizes.quick, columns, target)
    yield from _fits()
    yield Case("calibration", "calibration", {}, seconds=6, limit_s=120)
    yield from _tuning(sizes.quick, columns, target)
    yield from (
        replace(c, id=f"{c.id}, tuned") for c in _models(sizes.model, memory_bytes) if c.given["grain"]
    )
    yield from _tuning(sizes.full, columns, target)
    yield from _layers(sizes.full, columns, target)


def _on_cpu(sizes, everything):
    columns = layers.columns(Target("cpu"))
    yield from (replace(c, interpret=True) for c in _checks(sizes.tiny, columns, None))
    yield host(Target("cuda", 89, (3, 6)))
    yield from _cpu_models(sizes)
    for m in sizes.cpu_tokens:
        for n, k in sizes.cpu_layers:
            given = {"n": n, "k": k, "m": m}
            yield Case(f"cpu {n} x {k}, M {m}", "cpu", given, seconds=8, limit_s=240)
    if everything:
        yield from _fits()
        yield Case("calibration", "calibration", {}, seconds=10, limit_s=240)


def host(target: Target) -> Case:
    """Python in front of the launches of a whole step, as planned for a card."""
    return Case("host", "host", {"target": list(target.fields)}, seconds=4, limit_s=120)


def _given(case: layers.Case, **more) -> dict:
    return {"layer": vars(case).copy(), **more}


def _checks(cases, columns: list[Column] | tuple[Column, ...], target: Target | None):
    for case in cases:
        for column in columns:
            if target is None or not refusal(column, case.n, case.k, target):
                name = f"check {case.name}: {column.name}"
                yield Case(name, "check", _given(case, column=column.name), seconds=3, limit_s=90)


def _layers(cases, columns, target):
    """PyTorch's and comfy-kitchen's beside ours, each of ours compared before it is timed."""
    for case in cases:
        checks = list(_checks([case], columns, target))
        yield from checks
        for name in TORCH:
            yield Case(f"time {case.name}: {name}", "baseline", _given(case, name=name))
        for check in checks:
            name = check.id.replace("check", "time", 1)
            yield Case(name, "time", check.given, limit_s=30, needs=check.id)  # compiled before
        # Last: foreign native code that fails may take the device along.
        for name in KITCHEN:
            yield Case(f"time {case.name}: {name}", "baseline", _given(case, name=name))


def _models(size: Size, memory_bytes: int):
    """The whole step: in 16 bit, then ours, then ours with a LoRA, which 16-bit weights have merged."""
    part = "" if memory_bytes >= WHOLE_MODEL_BYTES else " of a quarter of the blocks"
    if part:
        size = replace(size, double=-(-size.double // 4), single=-(-size.single // 4))
    for grain, lora in (
        (None, 0),
        ("group", 0),
        ("channel", 0),
        ("group", LORA_RANK),
        ("channel", LORA_RANK),
    ):
        for batch, image in ((1, size.image), (1, size.image // 4), (2, size.image), (2, size.image // 4)):
            given = {"grain": grain, "lora": lora, "size": vars(replace(size, batch=batch, image=image))}
            side = round(16 * image**0.5)
            name = (
                f"model {grain or 'torch'}{' + LoRA' if lora else ''}, {side} x {side}, batch {batch}{part}"
            )
            yield Case(name, "model", given, seconds=5, limit_s=120)


def _cpu_models(sizes):
    for tokens in sizes.cpu_tokens:
        size = vars(replace(sizes.cpu_model, text=tokens // 8, image=tokens - tokens // 8))
        for grain, dtype in (
            (None, "float32"),
            (None, "bfloat16"),
            ("group", "float32"),
            ("channel", "float32"),
        ):
            given = {"grain": grain, "lora": 0, "size": size, "dtype": dtype}
            # A process each: its peak memory is the figure.
            name = f"model {grain or 'torch'} {dtype}, {tokens} tokens"
            yield Case(name, "model", given, seconds=15, limit_s=300, fresh=True)


def _fits():
    from ..bench_fit import LAYERS

    for method in FITTED:
        for layer in LAYERS:
            given = {"layer": layer, "method": method}
            yield Case(f"fit {layer}, {method}", "fit", given, seconds=8, limit_s=240)
        given = {"layer": "", "method": method}
        yield Case(f"fit block, {method}", "fit", given, seconds=15, limit_s=300)


def _tuning(cases, columns, target):
    for case in cases:
        for column in tuned_columns(columns):
            if refusal(column, case.n, case.k, target):
                continue
            problem = problem_of(case, column, target)
            for i, tile in enumerate(candidates(target, problem)):
                given = _given(case, column=column.name, tile=vars(tile).copy(), default=i == 0)
                name = f"tune {problem.key}: {text_of(tile)}"
                yield Case(name, "tune", given, seconds=4, limit_s=45, group=f"tune {problem.key}")
