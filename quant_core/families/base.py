"""What a family says of a model. Everything is in ComfyUI's key names; diffusers' names map onto them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...kernels.operator.errors import NamedError
from .layer import Layer, Part, by_block, natural
from .pointwise import spatial_of
from .rules import in_blocks, shared_modulation


class UnknownArchitecture(NamedError):
    """No family knows this model."""


@dataclass(frozen=True)
class Rule:
    """Pattern of module names within a block; `split`: "gelu" for x after GELU, "attn|gelu" and "attn|mlp"
    for the two halves of x.

    shared_input: the layer whose input this one shares; "{block}" in it stands for the block at hand,
    "{first}" for the first block of the model that has that layer. rows: only layers with that many times
    more out- than in-features; 0: all.
    """

    pattern: str
    split: str = ""
    weight_only: bool = False
    shared_input: str = ""
    rows: int = 0


@dataclass(frozen=True)
class Stacked:
    """Where one of ComfyUI's tensors comes from: diffusers' tensors whose rows it stacks.

    swap_halves: the two halves of the rows change places (the final layer's shift and scale).
    """

    keys: tuple[str, ...]
    swap_halves: bool = False

    def read(self, get) -> torch.Tensor:
        """ComfyUI's tensor. get: diffusers' key -> tensor; a lone one is passed on as it is, memory-mapped or
        not."""
        tensors = [get(key) for key in self.keys]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return torch.cat(tensor.chunk(2)[::-1]) if self.swap_halves else tensor

    def write(self, tensor: torch.Tensor, rows: list[int]) -> dict[str, torch.Tensor]:
        """The inverse of `read`. rows: of each of diffusers' tensors."""
        if self.swap_halves:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return dict(zip(self.keys, tensor.split(rows), strict=True))


def renamed(
    modules: Mapping[str, str | tuple[str, ...]], ours: str = "", theirs: str = ""
) -> dict[str, Stacked]:
    """{ComfyUI key: Stacked} of weights and biases. modules: {ComfyUI's name: diffusers' name or those it
    stacks}, behind the prefixes."""
    out = {}
    for name, others in modules.items():
        others = (others,) if isinstance(others, str) else others
        for leaf in ("weight", "bias"):
            out[f"{ours}{name}.{leaf}"] = Stacked(tuple(f"{theirs}{other}.{leaf}" for other in others))
    return out


def count(keys, stem: str) -> int:
    """How many blocks stem.0, stem.1 ... the keys have."""
    return len({k[len(stem) + 1 :].split(".", 1)[0] for k in keys if k.startswith(f"{stem}.")})


@dataclass(frozen=True)
class Family:
    """name: in files. block: regular expression of a block's prefix; `rules`: the layers within it. stems:
    beginnings of the blocks' names in the order of the forward pass, where that is not alphabetical. outside:
    rules for layers outside of the blocks, which are counted to the first one. kept: (pattern, why) of layers
    that neither the map nor the rules behind it take.

    signature: ComfyUI keys that must be there; `without`: key prefixes, ComfyUI's or diffusers', that must
    not (relatives with another layout).
    diffusers: {diffusers shapes} -> {ComfyUI key: Stacked}. diffusers_class: its name in diffusers. comfyui:
    whether ComfyUI has the model; the names of one that it does not have are diffusers' own. streams:
    beginnings of layer names within a block of each output of blocks with two, in ComfyUI's order and in
    diffusers'. chain: whether each block is fed by the one before alone, as training needs.
    """

    name: str
    title: str
    block: str
    rules: tuple[Rule, ...]
    signature: tuple[str, ...]
    diffusers_signature: tuple[str, ...]
    diffusers: Callable[[dict], dict[str, Stacked]]
    diffusers_class: str
    comfyui: bool = True
    streams: tuple[str, ...] = ()
    diffusers_streams: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    stems: tuple[str, ...] = ()
    outside: tuple[Rule, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    chain: bool = True

    def matches(self, shapes) -> bool:
        return self._has(self.signature, shapes)

    def matches_diffusers(self, shapes) -> bool:
        return self._has(self.diffusers_signature, shapes)

    def _has(self, signature, shapes):
        return all(k in shapes for k in signature) and not any(
            k.startswith(self.without) for k in shapes if self.without
        )

    @staticmethod
    def stream_of(streams: tuple[str, ...]) -> Callable[[str], int | None]:
        """layer name -> which of a block's outputs its stream is, None for layers of all."""
        return lambda name: next(
            (i for i, s in enumerate(streams) if re.match(rf".+?\.\d+\.{s}", name)), None
        )

    def layers(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Layer]:
        """The layers to quantize, block by block in the order of the forward pass: those of the map, then
        what the rules find beside them, such as parts that a variant of the model adds."""
        found = self.mapped(shapes)
        names = {layer.name for layer in found}
        found += [
            layer for layer in in_blocks(shapes) if layer.name not in names and not self.why_kept(layer.name)
        ]
        return by_block(
            found + [layer for layer in shared_modulation(shapes, found) if not self.why_kept(layer.name)]
        )

    def why_kept(self, name: str) -> str:
        """Why a layer stays in 16 bit by the map, "" where it does not say so."""
        return next((why for pattern, why in self.kept if re.fullmatch(pattern, name)), "")

    def mapped(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Layer]:
        """The layers of the map alone. A model's fingerprint is made of them, so that it stays when the rules
        learn something."""
        linear = {
            k.removesuffix(".weight"): s
            for k, s in shapes.items()
            if k.endswith(".weight") and spatial_of(s) is not None
        }
        found = []
        for name, (n, k, *_) in linear.items():
            match = re.fullmatch(f"(?P<block>{self.block})\\.(?P<rest>.+)", name)
            if match is None:
                continue
            for order, rule in enumerate(self.rules):
                if re.fullmatch(rule.pattern, match["rest"]) and rule.rows in (0, n / k):
                    found.append((self._position(match["block"]), order, name, match["block"], rule))
        found.sort(key=lambda f: f[:2])
        blocks = list(dict.fromkeys(block for *_, block, _ in found))
        outside = [
            (name, blocks[0], rule)
            for rule in self.outside
            for name in linear
            if re.fullmatch(rule.pattern, name)
        ]
        placed = outside + [f[2:] for f in found]
        return [self._layer(name, shapes, block, rule, blocks) for name, block, rule in placed]

    def _position(self, block):
        """input_blocks.4.1 before input_blocks.10.1, and before the blocks within it."""
        stem = next((i for i, s in enumerate(self.stems) if block.startswith(s)), 0)
        return stem, natural(block)

    def _layer(self, name, shapes, block, rule, blocks):
        n, k, *ones = shapes[f"{name}.weight"]
        if rule.split in ("attn|gelu", "attn|mlp"):
            # Out-channels = hidden = width of the attention half.
            parts = (
                Part(0, n),
                Part(n, k, after_gelu=rule.split == "attn|gelu"),
            )
        else:
            parts = (Part(0, k, after_gelu=rule.split == "gelu"),)
        shared = rule.shared_input.format(block=block, first="{first}")
        first = next((b for b in blocks if f"{shared.format(first=b)}.weight" in shapes), block)
        return Layer(
            name, block, k, n, parts, shared.format(first=first) or name, rule.weight_only, len(ones)
        )
