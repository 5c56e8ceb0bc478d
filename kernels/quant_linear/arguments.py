"""What the launches of a layer are given, worked out once: a forward only slices and allocates."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..operator.spec import LinearSpec
from ..operator.text import parse
from ..plan import Gemm, lower
from ..target import Target
from ..tuning import low_rank_limit


@dataclass(frozen=True)
class Quantize:
    """One launch of the quantizer.

    columns: of x, of the smoothing and of proj_down. code, segments: where its codes and its scales begin and
    end. ranks: its columns of the low rank; each part's own where `parts` has several. factors: of the
    learned transform, None without one. settings: the arguments behind the tensors, up to the prologue's.
    """

    columns: slice
    code: int
    segments: slice
    ranks: slice
    parts: tuple[tuple[slice, slice], ...]
    smooth: bool
    principal: int
    factors: slice | None
    settings: Any


@dataclass(frozen=True)
class Launch:
    """One launch of a product and those of the quantizer in front of it.

    columns, rows: of the packed weight and of its scales. settings: the arguments behind the tensors, as
    `launch.gemm` takes them; accumulate, the last of them, is true behind the first launch.
    """

    gemm: Gemm
    columns: slice
    rows: slice
    code_bytes: int
    segments: int
    quantize: tuple[Quantize, ...]
    settings: Any
    last: bool


@dataclass(frozen=True)
class Plan:
    """A layer's launches. fused: the quantizer computes the low-rank projection down. low: its columns."""

    spec: LinearSpec
    launches: tuple[Launch, ...]
    fused: bool
    low: int


@lru_cache(maxsize=1024)
def plan_of(text: str, fields: tuple) -> Plan:
    """The Plan of a `LinearSpec.text` whose parts all have quantized activations, on a Target of these
    `fields`."""
    spec, target = parse(text), Target(*fields)
    steps = lower(spec, target)
    limit = min(0 if p.kronecker else low_rank_limit(target, p.rotation) for p in spec.parts)
    launches = tuple(
        Launch(
            step,
            slice(step.column, step.column + step.row_bytes),
            slice(step.row, step.row + step.weight_segments),
            step.code_bytes,
            step.act_segments,
            tuple(_quantizes(spec, step)),
            (
                step.kernel,
                step.planes,
                step.scales,
                step.swap,
                step.block,
                step.ends,
                step.act_grouped,
                i > 0,
            ),
            i == len(steps) - 1,
        )
        for i, step in enumerate(steps)
    )
    # Principal components need x D before the quantizer begins.
    fused = 0 < spec.rank <= limit and not any(p.principal for p in spec.parts)
    return Plan(spec, launches, fused, spec.rank * len(spec.parts))


def _quantizes(spec, step):
    segment, number = 0, spec.parts.index(step.parts[0])
    for run in step.runs:
        part, act, count = run.part, run.part.activation, run.count
        segments = count * (part.width // 64 if step.act_grouped else 1)
        place = lambda i, part=part, number=number: (
            slice(part.start + i * part.width, part.start + (i + 1) * part.width),
            slice((number + i) * spec.rank, (number + i + 1) * spec.rank),
        )
        codes = (step.planes, act.bits, act.unsigned)
        factors = None
        if part.kronecker:
            p1, p2 = part.kronecker
            at = sum(p.factor_values for p in spec.parts[:number])
            factors = slice(at, at + count * part.factor_values)
            settings = (count, part.width // (p1 * p2), p1, p2, part.per_slice, *codes, act.clip)
        else:
            settings = (part.width, count, *codes, step.act_grouped, part.rotation, act.shift, act.clip)
        yield Quantize(
            slice(part.start, part.start + part.width * count),
            (part.start - step.start) // max(step.planes or 2, 1),
            slice(segment, segment + segments),
            slice(number * spec.rank, (number + count) * spec.rank),
            tuple(place(i) for i in range(count)),
            part.smooth,
            part.principal,
            factors,
            settings,
        )
        segment, number = segment + segments, number + count
