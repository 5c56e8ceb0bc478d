"""The form in which a layer should run on a machine, and what a report says of the paths that layers take."""

import os
from collections import Counter

from .dispatch import choose, has_kernels
from .operator.codes import NVFP4
from .operator.spec import LinearSpec
from .plan import has_groups
from .requirements import FP4, TORCH_INT8
from .target import Target

SWITCH = "NIBBLE_INT8"  # "0" in the environment: layers stay as they are stored where Triton does not run


def spec_at_load(spec: LinearSpec, target: Target) -> LinearSpec:
    """The layer as it should run on a target (`layer.precisions.in_int8` makes it); the same spec where that
    is how it is stored.

    On the cards of `Card.w8a8` layers with scales of groups are W8A8. Where torch's int8 product runs,
    weights are held in int8, since unpacking 4 bits at each call would double its time, and layers with
    scales of groups are W8A8 or W8A16; NIBBLE_INT8=0 in the environment keeps the 4 bits, at half the memory
    and several times the time. The same holds on any card for layers on the nvfp4 grid that it has no
    products for: W8A8 at twice the memory, with noise of about 1 % of what 4 bits cost.
    """
    if spec.grid == NVFP4:
        return _of_fp4(spec, target)
    if not all(p.activation is None or p.activation.granularity != "tensor" for p in spec.parts):
        return spec
    if target.card.w8a8 and target.triton is not None and all(p.activation for p in spec.parts):
        return spec.as_int8() if any(has_groups(p) for p in spec.parts) else spec
    if has_kernels(target) or os.environ.get(SWITCH) == "0":
        return spec
    if choose(spec.as_int8(), target).path == TORCH_INT8:
        return spec.as_int8()
    return spec


def _of_fp4(spec, target):
    eight = spec.as_int8()
    keeps = choose(spec, target).path == FP4 or os.environ.get(SWITCH) == "0"
    return spec if keeps or choose(eight, target).path == "eager" else eight


def paths_of(specs: dict[str, LinearSpec], target: Target) -> tuple[dict[str, str], list[str]]:
    """For a report: {layer: path} on a target, and lines that count the layers of each path with the reasons
    for it."""
    paths: dict[str, str] = {}
    counts: Counter = Counter()
    for name, spec in specs.items():
        run = spec_at_load(spec, target)
        choice = choose(run, target)
        paths[name] = choice.path + f" as {run.precision}" * (run is not spec)
        counts[paths[name], choice.refused] += 1
    lines = [f"Runs on {target}:"]
    for (path, refused), count in counts.most_common():
        lines.append(
            f"  {count} {'layer' if count == 1 else 'layers'}: {path}"
            + "".join(f"; {n}: {r}" for n, r in refused)
        )
    return paths, lines
