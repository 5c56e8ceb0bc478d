"""Which keys of a LoRA file found no layer. ComfyUI only logs them, those of hook LoRAs not at all, and hands
on the rest.

A patcher never sees the file: ComfyUI's loaders call the function `comfy.lora.load_lora`, keep its result and
give that to `add_patches`, or, where it is empty, nothing. So that function itself is wrapped, from the first
quantized model of a process on; `observe` says what the wrapper does.
"""

import functools
import threading
from collections.abc import Mapping, Sequence

import comfy.lora
import torch

_last = threading.local()


class _Read(dict):
    """A LoRA file's tensors that remembers whose were asked for. `load_lora` asks for a tensor where it has a
    use for it."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors if type(tensors) is dict else {k: tensors[k] for k in tensors})
        self.asked = set()

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: object = None) -> object:
        self.asked.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: object) -> object:
        self.asked.add(key)
        return super().pop(key, *default)


def observe() -> None:
    """Wraps `comfy.lora.load_lora`, once: same arguments, same result, and the keys it passed over are
    remembered."""
    inner = comfy.lora.load_lora
    if hasattr(inner, "nibble_observes"):
        return

    @functools.wraps(inner)
    def load_lora(lora, *args, **kwargs):
        read = _Read(lora)
        keys = list(read)
        loaded = inner(read, *args, **kwargs)
        # A tensor that was looked at in vain, such as OFT blocks of two dimensions, made no patch: where
        # there is none, nothing was used.
        used = (
            read.asked.union(*(getattr(value, "loaded_keys", ()) for value in loaded.values()))
            if loaded
            else ()
        )
        _last.value = (loaded, [k for k in keys if k not in used])
        return loaded

    load_lora.nibble_observes = True
    comfy.lora.load_lora = load_lora


def keys_of(loaded: dict) -> list[str] | None:
    """The keys without a layer of the file that `loaded`, a result of load_lora in this thread, came from;
    None if it did not."""
    value = getattr(_last, "value", None)
    return value[1] if value is not None and value[0] is loaded else None


def file_of(patches: dict) -> dict | None:
    """All that load_lora made of the file whose patches these are, or a part of them: some nodes hand on one
    key at a time. None if they did not come from it."""
    loaded, _ = last()
    return loaded if all(loaded.get(k) is value for k, value in patches.items()) else None


def last() -> tuple[dict, list[str]]:
    """What load_lora returned last in this thread, and the keys it passed over."""
    return getattr(_last, "value", ({}, []))


def sentence(keys: Sequence, what: str = "of the LoRA file found no layer in this model") -> str:
    """A count and up to four examples."""
    count = "1 key" if len(keys) == 1 else f"{len(keys)} keys"
    return f"{count} {what}: {', '.join(sorted(map(str, keys))[:4])}" + ", ..." * (len(keys) > 4)
