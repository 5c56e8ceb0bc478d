"""What a family says of a model. Everything is in ComfyUI's key names; diffusers' names map onto them."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch


class UnknownArchitecture(ValueError):
    """No family knows this model."""


@dataclass(frozen=True)
class Part:
    """In-channels start..stop of a layer that are quantized on their own. after_gelu: x >= -0.17 there."""

    start: int
    stop: int
    after_gelu: bool = False


@dataclass(frozen=True)
class Layer:
    """A linear layer to quantize.

    name: the module, without ".weight". block: the transformer block it belongs to. input: the layer whose input it
    shares (its own name, mostly); statistics are kept once for each input. weight_only: W4A16.
    """

    name: str
    block: str
    in_features: int
    out_features: int
    parts: tuple[Part, ...]
    input: str
    weight_only: bool = False


@dataclass(frozen=True)
class Rule:
    """Pattern of module names within a block; `split`: "gelu" for x after GELU, "attn|gelu" for the two halves."""

    pattern: str
    split: str = ""
    weight_only: bool = False
    shared_input: str = ""


@dataclass(frozen=True)
class Stacked:
    """Where one of ComfyUI's tensors comes from: diffusers' tensors whose rows it stacks.

    swap_halves: the two halves of the rows change places (the final layer's shift and scale).
    """

    keys: tuple[str, ...]
    swap_halves: bool = False

    def read(self, get) -> torch.Tensor:
        """ComfyUI's tensor. get: diffusers' key -> tensor; a lone one is passed on as it is, memory-mapped or not."""
        tensors = [get(key) for key in self.keys]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return torch.cat(tensor.chunk(2)[::-1]) if self.swap_halves else tensor


@dataclass(frozen=True)
class Family:
    """name: in files. block: regular expression of a block's prefix; `rules`: the layers within it.

    signature: ComfyUI keys that must be there; `without`: key prefixes that must not (relatives with another layout).
    diffusers: {diffusers shapes} -> {ComfyUI key: Stacked}.
    """

    name: str
    title: str
    block: str
    rules: tuple[Rule, ...]
    signature: tuple[str, ...]
    diffusers_signature: tuple[str, ...]
    diffusers: Callable[[dict], dict[str, Stacked]]
    without: tuple[str, ...] = ()

    def matches(self, shapes) -> bool:
        return all(k in shapes for k in self.signature) and not any(k.startswith(self.without) for k in shapes if self.without)

    def matches_diffusers(self, shapes) -> bool:
        return all(k in shapes for k in self.diffusers_signature)

    def layers(self, shapes: dict[str, tuple[int, ...]]) -> list[Layer]:
        """The layers to quantize, block by block in the order of the forward pass."""
        found = []
        for key, shape in shapes.items():
            match = re.fullmatch(f"(?P<block>{self.block})\\.(?P<rest>.+)\\.weight", key)
            if match is None or len(shape) != 2:
                continue
            for order, rule in enumerate(self.rules):
                if re.fullmatch(rule.pattern, match["rest"]):
                    found.append((_block_order(match["block"]), order, self._layer(key, match["block"], shape, rule)))
        return [layer for _, _, layer in sorted(found, key=lambda f: f[:2])]

    def _layer(self, key, block, shape, rule):
        name, (n, k) = key.removesuffix(".weight"), shape
        if rule.split == "attn|gelu":
            parts = (Part(0, n), Part(n, k, after_gelu=True))  # out-channels = hidden = width of the attention half
        else:
            parts = (Part(0, k, after_gelu=rule.split == "gelu"),)
        return Layer(name, block, k, n, parts, rule.shared_input or name, rule.weight_only)


def _block_order(block: str):
    stem, index = block.rsplit(".", 1)
    return stem, int(index)
