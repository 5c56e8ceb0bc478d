"""What a quantized model takes on a card, from its header alone."""

from dataclasses import dataclass
from math import prod

import torch

from ...kernels import spec_at_load
from ...kernels.operator.codes import NVFP4
from ...kernels.operator.spec import LinearSpec
from ...kernels.target import Target

TOKENS = 4608  # FLUX at 1024 x 1024 with 512 text tokens
_BYTES = {"weight": 1, "channel_order": 4, "outer_scale": 4}


@dataclass(frozen=True)
class Memory:
    """Bytes. weights: all tensors of the model as they lie on the card. layer: input, codes, low rank and
    output of the widest layer at `tokens` tokens; attention and what else the network holds at the time come
    on top. free, total: of this machine's card, None without one."""

    weights: int
    layer: int
    tokens: int
    int8: int  # how many layers are held in 8 bits because this machine is faster there
    free: int | None
    total: int | None

    def lines(self) -> list[str]:
        mib = lambda n: f"{n / 2**20:,.0f} MiB"
        again = f", {self.int8} layers in 8 bits as this machine runs them" * bool(self.int8)
        out = [
            f"on a card: {mib(self.weights)} of weights{again}; the widest layer works in "
            f"{mib(self.layer)} at {self.tokens} tokens"
        ]
        if self.free is None or self.total is None:
            return [*out, "this machine: no GPU, it runs on the CPU"]
        if self.weights + self.layer <= self.free:
            verdict = "the weights fit whole"
        elif self.weights + self.layer <= self.total:
            verdict = "the weights fit once other models are unloaded"
        else:
            verdict = "ComfyUI will load it in part and stream the rest"
        return [*out, f"this machine: {mib(self.free)} free of {mib(self.total)}; {verdict}"]

    def short(self) -> str:
        """One line that fits a node, e.g. "VRAM: 6.8 GB, and 0.3 GB to work in; this card has 24.0 GB"."""
        scale, unit = (1e9, "GB") if self.weights >= 1e8 else (1e6, "MB")
        need = f"VRAM: {self.weights / scale:.1f} {unit}, and {self.layer / scale:.1f} {unit} to work in"
        if self.total is None:
            return f"{need}; this machine has no GPU"
        fits = "" if self.weights + self.layer <= self.total else ": ComfyUI will stream a part"
        return f"{need}; this card has {self.total / scale:.1f} {unit}{fits}"


def predict(specs: dict[str, LinearSpec], rest: int, target: Target, tokens: int = TOKENS) -> Memory:
    """rest: bytes of all tensors that belong to no quantized layer."""
    run = {name: spec_at_load(spec, target) for name, spec in specs.items()}
    free = total = None
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
    weights = rest + sum(map(layer_bytes, run.values()))
    widest = max((working_bytes(spec, tokens) for spec in run.values() if not spec.weight_only), default=0)
    return Memory(weights, widest, tokens, sum(run[n] is not specs[n] for n in specs), free, total)


def layer_bytes(spec: LinearSpec) -> int:
    """Of a layer's tensors, with side data in 16 bit but for scales of channels, which methods without groups
    keep in fp32."""
    grouped = any(p.scale_rows > 1 for p in spec.parts)
    of_scales = 1 if spec.grid == NVFP4 else 2 if grouped else 4
    size = lambda name: _BYTES.get(name, 2 if name != "weight_scale" else of_scales)
    return sum(prod(shape) * size(name) for name, shape in spec.shapes().items())


def working_bytes(spec: LinearSpec, tokens: int) -> int:
    """x, x padded and y in 16 bit, the codes of x with their fp32 scales, x D in fp32."""
    codes = sum(p.width * (p.activation.bits if p.activation else 16) // 8 for p in spec.parts)
    scales = sum(
        p.width // p.activation.group if p.activation and p.activation.granularity == "group" else 1
        for p in spec.parts
    )
    padded = 2 * spec.width if spec.padding else 0
    return tokens * (
        2 * spec.in_features
        + padded
        + codes
        + 4 * scales
        + 4 * spec.rank * len(spec.parts)
        + 2 * spec.out_features
    )
