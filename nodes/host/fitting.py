"""Which patches of a LoRA a quantized model takes, which it leaves out with a warning, and which it refuses.

A LoRA of another architecture must not pass in silence, and one that fits but for a layer or two must act: a
Turbo LoRA for 64 in-channels does all but its `img_in` on FLUX Fill, which has 384. ComfyUI logs a misfit of
each layer and goes on, whatever their number. Here a file is refused where none of its patches fits, or where
more than half of those for packed layers do not; otherwise its misfits are left out. What no quantized layer
can take (another model, a reshaped packed weight) is refused wherever it stands.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from .adapters import UnsupportedPatch, misfit, only_scales, refused, reshaped, unusable
from .unmatched import sentence

# Of add_patches: a key of the state dict, or a tuple of one, an offset and perhaps a function.
PatchKey = str | tuple

EXAMPLES = 4


@dataclass(frozen=True)
class Target:
    """What a key of the state dict names: a tensor's logical shape, and its leaf where it belongs to a packed
    layer."""

    shape: tuple[int, ...]
    leaf: str = ""


@dataclass
class Sorted:
    """taken: patches to hand on. idle: those that multiply quantization data, which the weight's own patch
    does already. misfits and impossible: {key: reason}."""

    taken: dict = field(default_factory=dict)
    idle: list = field(default_factory=list)
    misfits: dict = field(default_factory=dict)
    impossible: dict = field(default_factory=dict)
    fits: int = 0
    packed: list[int] = field(default_factory=lambda: [0, 0])  # packed weights that are fitted, and missed


def sort(
    patches: dict,
    strengths: tuple[float, float],
    target_of: Callable[[str], Target | None],
    file: dict | None = None,
) -> Sorted:
    """Judges patches {key or (key, offset, function): value} as ModelPatcher's add_patches takes them.
    strengths: (strength_patch, strength_model). file: all patches of the file that these are a part of.
    Raises UnsupportedPatch by the rule above."""
    found = _sort(patches, strengths, target_of)
    reasons = found.impossible
    if found.misfits and not reasons:
        whole = found if file is None else _sort(file, strengths, target_of)
        fitted, missed = whole.packed
        if not whole.fits or missed > fitted:
            reasons = {key: f"{reason}, made for another model," for key, reason in whole.misfits.items()}
    if reasons:
        more = f" ({len(reasons)} such layers in all)" if len(reasons) > 1 else ""
        raise UnsupportedPatch(
            "; ".join([f"{key}: {reason}" for key, reason in reasons.items()][:EXAMPLES])
            + f" cannot be put on this quantized model{more}. An adapter must be made for this "
            "architecture; merge models in full "
            "precision, before Nibble Quantize."
        )
    return found


def of_another_shape(adapters: dict, target_of: Callable[[str], Target | None]) -> dict[str, str]:
    """{key: reason} of the adapters that cannot act beside their layer, on its input and output as they
    are."""
    found = {}
    for key, value in adapters.items():
        if target := target_of(key):
            patch = (1.0, value, 1.0, None, None)
            widened = reshaped(value, target.shape) and "a LoRA that reshapes the weight"
            if reason := widened or misfit(patch, target.shape):
                found[key] = reason
    return found


def left_out(
    misfits: dict[str, str], what: str = "of the LoRA file left out, made for layers of another shape"
) -> str:
    return sentence([f"{key} ({reason})" for key, reason in misfits.items()], what)


def parts_of(key: PatchKey) -> tuple[str, tuple[int, int, int] | None, Callable | None]:
    """(state dict key, offset, function) of a key of patches."""
    return (key, None, None) if isinstance(key, str) else (key[0], key[1], key[2] if len(key) > 2 else None)


def _sort(patches, strengths, target_of) -> Sorted:
    found = Sorted()
    for k, value in patches.items():
        key, offset, function = parts_of(k)
        patch, target = (strengths[0], value, strengths[1], offset, function), target_of(key)
        if target is None:
            found.taken[k] = value
        elif target.leaf not in ("", "weight", "bias"):
            if only_scales(patch):
                found.idle.append(k)
            else:
                found.impossible[key] = "a patch of quantization data"
        elif reason := (refused if target.leaf else unusable)(patch, target.shape):
            found.impossible[key] = reason
        else:
            _judge(found, k, patch, target)
    return found


def _judge(found, k, patch, target):
    reason = misfit(patch, target.shape)
    if reason:
        found.misfits[parts_of(k)[0]] = reason
    else:
        found.taken[k] = patch[1]
        found.fits += 1
    if target.leaf == "weight":
        found.packed[bool(reason)] += 1
