"""1x1 convolutions, which are linear layers over the channels.

A weight (N, K, 1) or (N, K, 1, 1) says nothing of strides, padding and groups, with which it is none.
ComfyUI's module does; a file alone is believed where the name is that of a layer which is one in every model
that has it.
"""

import re

# SD 1 and 2, ACE-Step, Conformers.
_KNOWN = re.compile(r"(^|\.)(proj_(in|out)|(inverted|point)_conv\.conv|pointwise_conv\d?)$")
# Joins the two streams of a U-Net, whose ranges differ (Q-Diffusion, arXiv 2302.04304, section 4.2), past
# every norm: 3 % of SD 1.5's weights, and a small random one is 0.27 off with them in 4 bits, 0.24 without.
_SKIP = re.compile(r"(^|\.)(skip_connection|conv_shortcut)$")


def spatial_of(shape) -> int | None:
    """Dimensions behind the channels of what a weight's layer reads: 0 for a linear layer, 1 or 2 for a
    convolution with a kernel of 1; None for anything else."""
    return len(shape) - 2 if 2 <= len(shape) <= 4 and all(n == 1 for n in shape[2:]) else None


def keeps_16_bit(name: str) -> bool:
    """Whether a 1x1 convolution of this name is left as it is."""
    return _SKIP.search(name) is not None


def why_unsure(layer, calibration=None) -> str:
    """Why a Layer that was found in a file may be no linear layer; "" where its name or a calibration, whose
    model had its module, says so."""
    if (
        not layer.spatial
        or _KNOWN.search(layer.name)
        or (calibration is not None and layer.input in calibration.names)
    ):
        return ""
    return (
        "a convolution with a kernel of 1, whose strides and groups a file does not say; the node Nibble "
        "Quantize knows them"
    )
