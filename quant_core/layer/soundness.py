"""Numbers that nothing can be fitted to: found before the fit where the cause is known, and named by layer
where linear algebra fails in it."""

import math
from contextlib import contextmanager
from pathlib import Path

import torch

FP32 = torch.finfo(torch.float32).max


class UnfitLayer(ValueError):
    """A layer whose weight, statistics or result hold numbers that nothing can be fitted to. The message
    names the layer."""


class NonFiniteWeight(UnfitLayer):
    """NaN or Inf in a weight or a bias."""


def largest(tensor: torch.Tensor) -> float:
    """The largest magnitude, NaN where there is one; 0 of an empty tensor. One pass, no copy but of 8-bit
    floats, which torch does not compare."""
    if not tensor.numel():
        return 0.0
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()
    low, high = tensor.aminmax()
    return float(torch.maximum(-low.float(), high.float()))


def require_sound(problem, where: Path | None = None):
    """Raises NonFiniteWeight for NaN or Inf in the weight or the bias, UnfitLayer for integers there, for
    weights whose squares overflow fp32 when they are summed, and for statistics that are not finite. where:
    the calibration that the statistics are of.

    Reads each of them once: 9 ms for a layer of 3072 x 3072 on one core, of which SVDQuant takes 2.5 s.
    """
    name, weight = problem.layer.name, problem.weight
    for leaf, tensor in (("weight", problem.original), ("bias", problem.bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise UnfitLayer(
                f"layer {name}: its {leaf} has the dtype {tensor.dtype}, expected floats. The checkpoint "
                "is damaged, or in a format that this pack does not read."
            )
    peak = largest(weight)
    for leaf, found in (("weight", peak), ("bias", 0.0 if problem.bias is None else largest(problem.bias))):
        if not math.isfinite(found):
            raise NonFiniteWeight(
                f"layer {name}: NaN or Inf in its {leaf}. The checkpoint is damaged, or was saved in a "
                "dtype too narrow for it."
            )
    # The strictest are squares of sums over a row, (K w)^2, and the energy of a whole weight, N K w^2.
    limit = FP32**0.5 / max(weight.shape)
    if peak > limit:
        raise UnfitLayer(
            f"layer {name}: its weight goes up to {peak:.3g}, and from {limit:.3g} on sums over "
            f"{weight.shape[0]} x {weight.shape[1]} weights "
            "overflow fp32. The checkpoint is damaged: download or save it again."
        )
    if problem.statistics is not None:
        _require_finite(name, problem.statistics, f"calibration {where}" if where else "the calibration")


def _require_finite(name, stats, calibration):
    held = {
        "largest values": [stats.absmax],
        "second moments": stats.hessians.values(),
        "held-out tokens": [stats.tokens],
    }
    for what, tensors in held.items():
        if all(math.isfinite(largest(t)) for t in tensors):
            continue
        bad = sum(int((~torch.isfinite(t)).sum()) for t in tensors)
        raise UnfitLayer(
            f"layer {name}: {calibration} has NaN or Inf in {bad} of the {what} of its input {stats.name}. "
            "Activations overflowed, or the "
            "file is damaged: calibrate again, in bf16 or fp32 or with other prompts."
        )


def require_finite_fit(name: str, layer):
    """Raises UnfitLayer where a fitted layer has NaN or Inf in a tensor of floats. layer: a QuantizedLayer,
    or None for 16 bit."""
    for key, tensor in layer.tensors.items() if layer is not None else ():
        if tensor.is_floating_point() and not math.isfinite(largest(tensor)):
            raise UnfitLayer(
                f"layer {name}: NaN or Inf in the {key} that was fitted to it, in "
                f"{str(tensor.dtype).removeprefix('torch.')}. Numbers of the "
                "layer or of its calibration leave that range: save the model in bf16, or calibrate again."
            )


@contextmanager
def naming(name: str, weight: torch.Tensor | None = None, statistics=None):
    """Makes a failure of linear algebra within the block an UnfitLayer that names the layer and says how
    large its numbers are."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        found = [] if weight is None else [f"its weight goes up to {largest(weight):.3g}"]
        if statistics is not None:
            found.append(f"its input up to {largest(statistics.absmax):.3g}")
        why = str(error).split(": ", 1)[-1].split(" (")[0].rstrip(".")
        raise UnfitLayer(
            f"layer {name}: cannot be fitted, {why}{''.join(f'; {f}' for f in found)}. Its numbers are too "
            "large or too small for fp32: "
            "check the checkpoint, calibrate again with other prompts, or take the method rtn or convrot."
        ) from error
