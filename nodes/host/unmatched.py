"""Which keys of a LoRA file found no layer. ComfyUI logs them one by one, those of hook LoRAs not at all, and hands on only the rest."""

import functools
import logging
import threading

import comfy.lora

_NOT_LOADED = "lora key not loaded: "
_last = threading.local()


class _Lines(logging.Filter):
    """Gathers ComfyUI's lines about keys of one thread; keeps them off the log where the caller asked for none."""

    def __init__(self, keep):
        super().__init__()
        self.keep, self.thread, self.keys = keep, threading.get_ident(), []

    def filter(self, record):
        message = record.getMessage() if record.thread == self.thread else ""
        if not message.startswith(_NOT_LOADED):
            return True
        self.keys.append(message.removeprefix(_NOT_LOADED))
        return self.keep


def observe():
    """Wraps `comfy.lora.load_lora`, once: same arguments, same result, and the keys it passed over are remembered."""
    inner = comfy.lora.load_lora
    if hasattr(inner, "nibble_observes"):
        return

    @functools.wraps(inner)
    def load_lora(lora, to_load, log_missing=True):
        lines, log = _Lines(log_missing), logging.getLogger()
        log.addFilter(lines)
        try:
            loaded = inner(lora, to_load, log_missing=True)
        finally:
            log.removeFilter(lines)
        _last.value = (loaded, lines.keys)
        return loaded

    load_lora.nibble_observes = True
    comfy.lora.load_lora = load_lora


def keys_of(loaded) -> list[str] | None:
    """The keys without a layer of the file that `loaded`, a result of load_lora in this thread, came from; None if it did not."""
    value = getattr(_last, "value", None)
    return value[1] if value is not None and value[0] is loaded else None


def last() -> tuple[dict, list[str]]:
    """What load_lora returned last in this thread, and the keys it passed over."""
    return getattr(_last, "value", ({}, []))


def sentence(keys, what="of the LoRA file found no layer in this model") -> str:
    """A count and up to four examples."""
    count = "1 key" if len(keys) == 1 else f"{len(keys)} keys"
    return f"{count} {what}: {', '.join(sorted(map(str, keys))[:4])}" + ", ..." * (len(keys) > 4)
