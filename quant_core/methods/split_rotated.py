"""A part of a SplitQuant layer in the form that every kernel has: slices of 64 or 256 channels share a
Hadamard matrix, a rotation to the quantizer, and each group of 64 channels has a scale on both sides."""

import torch

from ...kernels.operator.spec import GELU_SHIFT, ActivationSpec, PartSpec
from ...kernels.operator.transforms import rotation_size
from ..layer.assemble import smoothing
from ..layer.chunks import row_chunks
from .svdquant import PartFit

WIDTHS = (64, 256)


class RotatedPart(PartFit):
    """The fit of one part, without a low rank; see PartFit. Held-out tokens choose among no transform and
    slices of each of the WIDTHS."""

    def _specs(self):
        start, stop, smooth = self.part.start, self.part.stop, self.x is not None
        codes = ActivationSpec(unsigned=True, shift=GELU_SHIFT) if self.part.after_gelu else ActivationSpec()
        yield PartSpec(start, stop, activation=codes, smooth=smooth)
        for size in dict.fromkeys(rotation_size(stop - start, width) for width in WIDTHS):
            yield PartSpec(start, stop, smooth=smooth, rotation=size)

    def smooths(self, shift):
        """Also what makes the energies of both sides the same, channel by channel: of a slice that is rotated
        they set the ranges, and the rounding errors' product is least so (`balance`, of a diagonal). 0.1 dB
        on most kinds of inputs, 0.2 after a GELU."""
        yield from super().smooths(shift)
        if energy := [self.statistics.hessians[b].diagonal() for b in self.blocks()]:
            x = (torch.cat(energy).to(self.x) / self.statistics.count).sqrt() + shift
            rows = row_chunks(*self.weight.shape, device=self.weight.device)
            w = sum(self.weight[r].float().square().sum(0) for r in rows) / len(self.weight)
            yield "rms of both 0.5/0.5", smoothing(x, w.sqrt(), 0.5, 0.5, self.dtype)
