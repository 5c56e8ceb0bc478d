"""Times of calls on the device, and the ceilings that they are held against."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch

BUDGET_S = 0.15  # device time for one number
SAMPLES = (5, 20)
GROUP_MS = 0.1  # calls shorter than this are timed several at a time
MAX_GROUP = 8
CYCLES_PER_SECOND = 2.0e9  # of the sleeping kernel, roughly


@dataclass(frozen=True)
class Work:
    """One call and its operands: tensors, or None where the call has nothing."""

    call: Callable
    operands: tuple
    note: str = ""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.operands if t is not None)


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: over `samples` samples of `group` calls. host_ms: what the caller's thread spends
    on a call.

    queued: all calls were queued before the first one ran, so the caller's speed is not in the numbers.
    """

    ms: float
    min_ms: float
    p90_ms: float
    host_ms: float
    samples: int
    group: int
    copies: int
    queued: bool

    def to_json(self) -> dict:
        return asdict(self)


def copies_needed(nbytes: int, cache: int) -> int:
    """How many copies of the operands exceed twice the cache, so that no call finds its own there."""
    return 2 * cache // max(nbytes, 1) + 1


def rotated(work: Work, cache: int) -> list[tuple]:
    """The operands and enough clones of them."""
    clones = range(copies_needed(work.nbytes, cache) - 1)
    return [work.operands] + [tuple(None if t is None else t.clone() for t in work.operands) for _ in clones]


def median(values) -> float:
    values = sorted(values)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def percentile(values, part: float) -> float:
    """The smallest value that at least `part` of the values do not exceed."""
    values = sorted(values)
    return values[max(0, math.ceil(part * len(values)) - 1)]


def l2_bytes(device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def measure(work: Work, device) -> Timing:
    """Device time of a call."""
    sets = rotated(work, l2_bytes(device))
    for i in range(3):  # the first compiles
        work.call(*sets[i % len(sets)])
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for i in range(3):
        work.call(*sets[i % len(sets)])
    host_s = (time.perf_counter() - started) / 3
    estimate = max(_sampled(work, sets, device, 1, 3, host_s)[0][0], 1e-3)
    group = min(MAX_GROUP, max(1, round(GROUP_MS / estimate)))
    samples = int(min(SAMPLES[1], max(SAMPLES[0], 1000 * BUDGET_S / (estimate * group))))
    times, host_s, queued = _sampled(work, sets, device, samples, group, host_s)
    return Timing(
        median(times), min(times), percentile(times, 0.9), 1000 * host_s, samples, group, len(sets), queued
    )


def _sampled(work: Work, sets, device, samples: int, group: int, host_s: float):
    """(milliseconds a call of each sample, seconds of the caller a call, whether all was queued in time). A
    sleeping kernel holds the device back until the calls are queued; host_s: what the caller is expected to
    need for one."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
    torch.cuda.synchronize(device)
    asleep_s = min(0.2, 2 * host_s * samples * group + 0.002)
    torch.cuda._sleep(int(asleep_s * CYCLES_PER_SECOND))
    started, at = time.perf_counter(), 0
    events[0].record()
    for event in events[1:]:
        for _ in range(group):
            work.call(*sets[at % len(sets)])
            at += 1
        event.record()
    host_s = time.perf_counter() - started
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / group for a, b in pairwise(events)], host_s / at, host_s < asleep_s


def ceilings(device, dtype) -> dict[str, Callable[[], float]]:
    """How to measure what this card reaches at best: products of 8192^3 in FLOP/s (a multiply and an add are
    2), and a copy of 1 GiB in bytes/s, its reads and its writes counted."""
    size = 8192
    flops = 2 * size**3
    factors = lambda: [torch.randn(size, size, dtype=dtype, device=device) for _ in range(2)]
    codes = lambda: tuple((t.float() * 32).clamp(-127, 127).to(torch.int8) for t in factors())
    per_second = lambda amount, work: 1000 * amount / measure(work, device).min_ms

    def copy():
        source, target = (torch.ones(2**30, dtype=torch.int8, device=device).random_() for _ in range(2))
        return per_second(2 * source.nbytes, Work(lambda s: target.copy_(s), (source,)))

    return {
        "bf16_flops": lambda: per_second(flops, Work(lambda a, b: a @ b.T, tuple(factors()))),
        "int8_flops": lambda: per_second(flops, Work(lambda a, b: torch._int_mm(a, b.T), codes())),
        "bytes_per_s": copy,
    }
