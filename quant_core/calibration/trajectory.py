"""Recorded inputs of the whole network, from the calibration's sampling runs: what training and gains run the
network on again."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..layer.statistics import reservoir_keys

CALLS = 128  # kept of a calibration; 30 MB at FLUX's 512 px with 16 prompts, each text's tokens stored once
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Call:
    """One evaluation of the network. arguments: {"args", "kwargs"} with {"tensor": name} where a tensor
    stands."""

    sample: int
    step: int
    timestep: float
    held_out: bool
    key: float
    arguments: dict


@dataclass
class Recorder:
    """Keeps CALLS calls of all that `add` is given, those with the smallest keys: uniform, whatever the order
    (see InputStatistics)."""

    calls: list[Call] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(
        self, seed: int, sample: int, step: int, timestep: float, held_out: bool, args: tuple, kwargs: dict
    ):
        """Offers a call of network(*args, **kwargs). Tensors are copied to the CPU; what is neither tensor,
        number nor text is left out."""
        key = float(reservoir_keys(seed, "trajectory", sample, step, 0, 1))
        if len(self.calls) == CALLS and key >= self.calls[-1].key:
            return
        found: dict[str, torch.Tensor] = {}
        arguments = {
            "args": [_record(a, found) for a in args],
            "kwargs": {k: _record(v, found) for k, v in kwargs.items()},
        }
        self.tensors |= {name: t for name, t in found.items() if name not in self.tensors}
        self.calls = sorted(
            [*self.calls, Call(sample, step, timestep, held_out, key, arguments)], key=lambda c: c.key
        )[:CALLS]
        used = {name for call in self.calls for name in names_in(call.arguments)}
        self.tensors = {name: t for name, t in self.tensors.items() if name in used}


@dataclass(frozen=True)
class Trajectory:
    """The calls of a calibration in the order of sampling. get(name) -> a recorded tensor, read at each use."""

    calls: list[Call]
    get: Callable[[str], torch.Tensor]

    def __len__(self) -> int:
        return len(self.calls)

    def arguments(self, index: int, device: torch.device | str = "cpu") -> tuple[list, dict]:
        """(args, kwargs) of a call, tensors copied to `device`."""
        made = _replay(self.calls[index].arguments, lambda name: self.get(name).to(device, copy=True))
        return made["args"], made["kwargs"]

    def run(self, network: torch.nn.Module, index: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """What the network predicts for a call; the first of a tuple or of diffusers' outputs."""
        args, kwargs = self.arguments(index, device)
        out = network(*args, **kwargs)
        return out if isinstance(out, torch.Tensor) else out[0]


def _record(value, found):
    if isinstance(value, torch.Tensor):
        # A sampler's expanded timestep of a single value has the stride 0, which a plain clone keeps and
        # `view` refuses.
        value = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        digest = hashlib.blake2b(value.flatten().view(torch.uint8).numpy().tobytes(), digest_size=12)
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found[digest.hexdigest()] = value
        return {"tensor": digest.hexdigest()}
    if isinstance(value, (list, tuple)):
        return [_record(v, found) for v in value]
    if isinstance(value, dict):
        return {
            "dict": {k: _record(v, found) for k, v in value.items() if isinstance(k, str) and _is_data(v)}
        }
    return value if isinstance(value, _PLAIN) else None


def _is_data(value) -> bool:
    """Whether a dict's value is tensors, numbers and text all through. ComfyUI's transformer_options also
    hold patches and callbacks: those of the run that samples later are not these."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_data, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_data(v) for k, v in value.items())
    return isinstance(value, (*_PLAIN, torch.Tensor))


def names_in(value) -> list[str]:
    """Names of the tensors in the arguments of a call."""
    if isinstance(value, list):
        return [n for v in value for n in names_in(v)]
    if not isinstance(value, dict):
        return []
    return (
        [value["tensor"]]
        if "tensor" in value
        else [n for v in value.get("dict", value).values() for n in names_in(v)]
    )


def _replay(value, get):
    if isinstance(value, list):
        return [_replay(v, get) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return get(value["tensor"])
    return {k: _replay(v, get) for k, v in value.get("dict", value).items()}
