"""Where in a file the network's tensors are: what stands before their names, or within them, and is no part
of them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..families import known
from ..store.safe import CheckpointError
from .origin import is_of_another_model

# ComfyUI 0.33 (`comfy.model_detection.unet_prefix_from_state_dict`): the first three where more than five
# keys have them, else the last.
_COMFYUI = ("model.diffusion_model.", "model.model.", "net.")
_COMFYUI_LAST = "model."
# What trainers and exporters put in front; they also come one behind the other.
_TRAINERS = (
    "diffusion_model.",
    "transformer.",
    "unet.",
    "module.",
    "base_model.model.",
    "dit.",
    *_COMFYUI,
    _COMFYUI_LAST,
)
# Pieces that wrappers of single modules leave in names: torch.compile, FSDP, activation checkpoints, PEFT.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})
_ADAPTERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector")
_OWN = ("core",)  # first pieces of names that belong to the network: PixelDiT
_OWN_LISTS = ("transformer.",)  # those of some tensors of a network: Stable Audio
# What stands beside a prefixed network and says nothing of its prefix: counters and tables of their own, and
# what trainers keep.
_BESIDE = re.compile(r"[^.]+|((model_)?ema|optim|sched|lr_sched|loss|callback|trainer)\w*\..*")
_DEPTH = 3


@dataclass(frozen=True)
class Names:
    """prefix: what was taken off, "" for nothing. keys: {name within the network: key in the file}. outside:
    keys of everything else."""

    prefix: str
    keys: dict[str, str]
    outside: tuple[str, ...]


def network(keys: Iterable[str], where: str) -> Names:
    """The network's names among `keys`, in ComfyUI's or diffusers' spelling.

    A prefix is taken off where a model that this pack has a map of is behind it, else where ComfyUI itself
    takes it off or blocks of layers are behind one that trainers write. Raises CheckpointError, beginning
    with `where`, for adapters that are not merged, and for names that all begin with something unknown:
    ComfyUI could not load what was made of them.
    """
    plain: dict[str, str] = {}
    for key in keys:
        name = ".".join(piece for piece in key.split(".") if piece not in WRAPPERS) if "_" in key else key
        if name in plain:
            raise CheckpointError(
                f"{where}: {plain[name]} and {key} are the same tensor {name}. Save the model again "
                "without wrappers."
            )
        plain[name] = key
    if any(".base_layer." in key for key in plain.values()):
        _require_merged(plain, where)
    found = _known(set(plain), "", _DEPTH)
    prefix = found if found is not None else _in_front(plain, where)
    inside = {name.removeprefix(prefix): key for name, key in plain.items() if name.startswith(prefix)}
    taken = set(inside.values())
    return Names(prefix, inside, tuple(key for key in plain.values() if key not in taken))


def _known(names: set[str], prefix: str, depth: int) -> str | None:
    """The prefix behind which a mapped family's names are; the shortest one."""
    if known(names):
        return prefix
    if not depth:
        return None
    candidates = [p for p in _TRAINERS if any(n.startswith(p) for n in names)]
    if (shared := _shared(_network(names))) and shared not in candidates:
        candidates.append(shared)
    for p in candidates:
        if (
            found := _known({n.removeprefix(p) for n in names if n.startswith(p)}, prefix + p, depth - 1)
        ) is not None:
            return found
    return None


def _in_front(names, where) -> str:
    """The prefix of a model without a map: ComfyUI's own choice, what trainers put behind or instead of it,
    and nothing else."""
    prefix = _by_comfyui(names)
    if prefix is None:
        prefix = next((p for p in _TRAINERS if p not in _OWN_LISTS and _has_blocks(names, p)), "")
    for _ in range(_DEPTH):
        inside = _network({n.removeprefix(prefix) for n in names if n.startswith(prefix)})
        more = next((p for p in _TRAINERS if inside and all(n.startswith(p) for n in inside)), None)
        if more is None:
            break
        prefix += more
    shared = _shared(inside)
    if shared and shared.removesuffix(".") not in _OWN:
        raise CheckpointError(
            f"{where}: the names of all {len(inside)} tensors begin with {prefix + shared!r}, such as "
            f"{prefix + min(inside)}. ComfyUI has no such model "
            f"and takes off no such prefix; expected {', '.join(_COMFYUI)} or none. Save the network's own "
            "state dict."
        )
    return prefix


def _network(names: set[str]) -> set[str]:
    """Without what may stand beside a network; all of them where nothing else is there."""
    return {n for n in names if not _BESIDE.fullmatch(n) and not is_of_another_model(n)} or names


def _by_comfyui(names) -> str | None:
    """ComfyUI's own choice; None where it would take nothing off."""
    counts = {p: sum(n.startswith(p) for n in names) for p in _COMFYUI}
    top = max(counts, key=counts.__getitem__)
    if counts[top] > 5:
        return top
    return _COMFYUI_LAST if any(n.startswith(_COMFYUI_LAST) for n in names) else None


def _has_blocks(names, prefix) -> bool:
    """Whether numbered modules 0, 1, ... are behind a prefix."""
    behind = [n.removeprefix(prefix).split(".") for n in names if n.startswith(prefix)]
    return any("0" in pieces for pieces in behind) and any("1" in pieces for pieces in behind)


def _shared(names) -> str:
    """The first piece, with its dot, that all names have; "" where they differ."""
    first = {n.partition(".")[0] for n in names}
    return f"{first.pop()}." if len(first) == 1 else ""


def _require_merged(names, where):
    adapters = [n for n in names if any(piece in _ADAPTERS for piece in n.split("."))]
    if adapters:
        raise CheckpointError(
            f"{where}: holds an adapter beside the weights that it changes ({len(adapters)} tensors, first "
            f"{min(adapters)}). Merge it before "
            "saving (PEFT: merge_and_unload), or the model would come out without it."
        )
