"""Formats that a quantized model can be written in: one class each, and a table."""

from pathlib import Path
from typing import ClassVar

import torch

from ...kernels.operator.codes import NVFP4
from ..formats import nibble
from ..formats.kitchen import native, nvfp4
from ..formats.kitchen import write as kitchen
from ..formats.nunchaku import read as nunchaku
from ..formats.nunchaku.variants import FP4, variant_of
from ..formats.opened import Opened
from ..formats.zero_points import offsets_only
from ..layer.linear import QuantizedLayer, same_bits
from .replace import NEAREST, nearest_spec


class Writer:
    """One format. title: what it is, for a report. replacement: what layers become that it does not have,
    where there is one way only."""

    title: ClassVar[str]
    replacement: ClassVar[str] = ""

    def exact(self, source: Opened) -> str:
        """What layers lose that count as written as they are."""
        return ""

    def losses(self, source: Opened, awq: bool) -> dict[str, str]:
        """{layer: why it cannot stay as it is}. awq: whether who shall read the file has awq_w4a16."""
        return {}

    def impossible(self, source: Opened, lossy: dict[str, str]) -> str:
        """Why there is no such file of the model at all, ""; lossy: what `losses` found."""
        return ""

    def save(
        self, path: Path, source: Opened, layers: dict, rest: dict[str, torch.Tensor], awq: bool
    ) -> list[str]:
        """Writes layers and the rest of `source`. Returns sentences on what the format changed."""
        raise NotImplementedError

    def stays(self, name: str, found: Opened, notes: list[str]) -> bool:
        """Whether a layer that was to be written as it is must read back so. found: the file that was
        written; notes: what `save` said of it."""
        return True

    def same(self, found: QuantizedLayer, layer: QuantizedLayer) -> bool:
        """Whether a layer read from the file is the one that was written."""
        same = all(k in found.tensors and same_bits(found.tensors[k], t) for k, t in layer.tensors.items())
        # A format may ask for a low rank of zeros and smoothing by one where the layer has none.
        return same and (found.spec == layer.spec or same_bits(found.dequantize(), layer.dequantize()))


class Nibble(Writer):
    title = "the pack's own file"

    def save(self, path, source, layers, rest, awq):
        origin = {"origin": source.origin}
        nibble.save(path, layers, rest, source.family, source.provenance, source.report, **origin)
        return []


class Kitchen(Writer):
    title = "comfy-kitchen's svdquant_w4a4 beside the native formats; runs where ComfyUI's core takes it"
    module: ClassVar = kitchen

    def losses(self, source, awq):
        return self.module.losses(source.specs, source.layer, awq)

    def save(self, path, source, layers, rest, awq):
        metadata = {"family": source.family, "provenance": source.provenance, "report": source.report}
        self.module.save(path, layers, rest, metadata, source.origin, awq)
        return []

    def same(self, found, layer):
        """Of nvfp4 the powers of two of rows are moved into the scales of their groups."""
        return super().same(found, nvfp4.with_one_scale(layer) if layer.spec.grid == NVFP4 else layer)


class Native(Kitchen):
    title = (
        "stock ComfyUI (convrot_w4a4, int8_tensorwise and nvfp4), loaded by Load Diffusion Model without "
        "this pack"
    )
    module = native


class Nunchaku(Writer):
    """Modulation loses its low rank, which nunchaku does not have; any other misfit has no replacement
    there."""

    title = "nunchaku's SVDQuant, INT4 or NVFP4 as the model is, one file"
    replacement = NEAREST

    def exact(self, source):
        lost = ", but for biases, which nunchaku has in 16 bit"
        if variant_of(list(source.specs.values())) is FP4:
            lost += ", and activations, whose scales of 16 channels it rounds without one a token above them"
        return lost

    def losses(self, source, awq):
        lossy = nunchaku.losses(source.specs, source.family)
        for name, spec in source.specs.items():
            if name not in lossy and spec.weight_only and spec.rank and not offsets_only(source.layer(name)):
                why = f"has a low-rank branch of rank {spec.rank}, and nunchaku's modulation layers have none"
                lossy[name] = why
        return lossy

    def impossible(self, source, lossy):
        weight_only = [name for name in lossy if name in source.specs and source.specs[name].weight_only]
        bare = {name: nearest_spec(source.specs[name]) for name in weight_only}
        misfits = nunchaku.losses(source.specs | bare, source.family)
        if not misfits:
            return ""
        why = "; ".join(f"{name} {sentence}" for name, sentence in list(misfits.items())[:3])
        more = f" ({len(misfits)} such layers)" * (len(misfits) > 3)
        return f"{why}{more}. Quantize the full-precision model with the method svdquant."

    def save(self, path, source, layers, rest, awq):
        return nunchaku.save(path, layers, rest, source.family, source.provenance)

    def stays(self, name, found, notes):
        """Some weight-only layers are in 16 bit there, and what `save` names is changed."""
        return name in found.specs and not any(note.startswith((f"{name} ", f"{name}:")) for note in notes)

    def same(self, found, layer):
        return nunchaku.reads_back(found, layer) or super().same(found, layer)


WRITERS: dict[str, Writer] = {
    "native": Native(),
    "kitchen": Kitchen(),
    "nunchaku": Nunchaku(),
    "nibble": Nibble(),
}
