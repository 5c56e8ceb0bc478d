"""What the pack makes of a class at full width, from the shapes of its network on the meta device: no weight
is ever allocated."""

from collections import defaultdict
from dataclasses import dataclass
from math import prod

import torch

from comfyui_nibble.kernels.operator.quantizers import GROUP
from comfyui_nibble.kernels.operator.spec import LinearSpec, PartSpec
from comfyui_nibble.quant_core.families import GENERIC
from comfyui_nibble.quant_core.layer.memory import layer_bytes
from comfyui_nibble.quant_core.run.layers import not_quantizable
from comfyui_nibble.tests.host.sweep.tiny import config_of

TABLES = "biases, norms and tables"
RANK = 32  # the default of Nibble Quantize


@dataclass(frozen=True)
class Facts:
    """family: its title, "rules" without a map. weights: values of the network's tensors; quantized: of them
    in 4 bits; nbytes: of all as Nibble Save Model writes them. kept: {why: (values, the largest tensor)} of
    the others."""

    family: str
    weights: int
    quantized: int
    nbytes: int
    kept: dict[str, tuple[int, str]]

    @property
    def share(self) -> float:
        return self.quantized / self.weights


def facts(entry) -> Facts:
    """Of an entry's class at full width."""
    from comfy.model_patcher import ModelPatcher

    from comfyui_nibble.nodes.host.source import ModelSource

    config = config_of(entry, narrow=False)
    config.set_inference_dtype(torch.bfloat16, None)
    outside = {k: torch.zeros(shape) for k, shape in entry.outside.items()}
    model = config.get_model(outside, "", device=entry.device)
    source = ModelSource(ModelPatcher(model, torch.device("cpu"), torch.device("cpu")))
    layers = {layer.name: layer for layer in source.layers if not not_quantizable(layer)}
    kept = defaultdict(list)
    quantized = nbytes = 0
    for key, shape in source.shapes.items():
        name, _, leaf = key.rpartition(".")
        if name in layers and leaf == "weight":
            quantized += prod(shape)
            nbytes += layer_bytes(_spec(layers[name], f"{name}.bias" in source.shapes))
        elif name not in layers:
            kept[_why(key, shape, source)].append((prod(shape), key))
    weights = sum(map(prod, source.shapes.values()))
    nbytes += 2 * sum(n for group in kept.values() for n, _ in group)
    largest = {
        why: (sum(n for n, _ in group), "" if why == TABLES else max(group)[1]) for why, group in kept.items()
    }
    title = source.family.title if source.family is not GENERIC else "rules"
    return Facts(
        title, weights, quantized, nbytes, dict(sorted(largest.items(), key=lambda item: -item[1][0]))
    )


def _spec(layer, bias) -> LinearSpec:
    """Of svdquant_r with its default rank."""
    padding = -layer.in_features % GROUP
    stops = [p.stop for p in layer.parts[:-1]] + [layer.in_features + padding]
    rank = min(RANK, layer.out_features, *(p.stop - p.start for p in layer.parts))
    quantizers = {"activation": None} if layer.weight_only else {"smooth": True}
    parts = tuple(
        PartSpec(p.start, stop, rank=rank, **quantizers) for p, stop in zip(layer.parts, stops, strict=True)
    )
    return LinearSpec(layer.in_features, layer.out_features, parts, bias, padding=padding)


def _why(key, shape, source) -> str:
    name, _, leaf = key.rpartition(".")
    module = source.modules[name]
    if leaf == "weight" and isinstance(module, torch.nn.modules.conv._ConvNd) and max(module.kernel_size) > 1:
        return "convolutions"
    if isinstance(module, torch.nn.Embedding):
        return "embeddings"
    if leaf != "weight" or len(shape) < 2:
        return TABLES
    if min(shape[:2]) < GROUP:
        return f"narrower than {GROUP}"
    within = any(name.startswith(f"{block}.") for block in {layer.block for layer in source.layers})
    by = "rules" if source.family is GENERIC else "map"
    return f"within blocks, left out by the {by}" if within else "outside of the repeated blocks"
