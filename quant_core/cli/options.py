"""Arguments and options of the command, with the texts of its help."""

from pathlib import Path
from typing import Annotated

import typer

Base3 = Annotated[
    bool,
    typer.Option(
        "--base3", help="Ternary weights take 1.6 instead of 2 bits in the file; memory stays the same."
    ),
]
Source = Annotated[
    Path, typer.Argument(help="Full-precision safetensors file, or a diffusers `transformer` folder.")
]
Quantized = Annotated[
    Path, typer.Argument(help="The file to write. Put it into ComfyUI's models/diffusion_models.")
]
MethodName = Annotated[
    str | None,
    typer.Option(
        help="svdquant_r (if neither this nor a wish is given), svdquant, svdquant_p, splitquant, "
        "splitquant_4, convrot, rtn, robuq, or native: what stock ComfyUI runs."
    ),
]
Wish = Annotated[
    str | None,
    typer.Option(
        help="In place of a method: balanced, fast (takes no calibration), best, smallest, or 'fits 8 GB' "
        "(6 to 24); chooses method and precisions as Nibble Quantize for My Card does."
    ),
]
MaybeCalibration = Annotated[
    Path | None,
    typer.Option(help="Statistics from Nibble Calibrate or `nibble calibrate`; data-free without."),
]
MaybeRank = Annotated[
    int | None, typer.Option(help="SVDQuant and RobuQ: rank of the 16-bit branch; 32 if not given.")
]
MaybeGptq = Annotated[
    bool | None, typer.Option(help="SVDQuant and RobuQ: try GPTQ rounding; on if not given.")
]
MaybeGrid = Annotated[
    str | None,
    typer.Option(
        help="SVDQuant, ConvRot, rtn and native: int (if not given), or nvfp4: 4-bit floating-point codes, "
        "which RTX 50 and B200 multiply at twice the rate of int8."
    ),
]
Training = Annotated[
    str,
    typer.Option(
        help="none, standard or best: SplitQuant and RobuQ, then trained against the full-precision "
        "model of a diffusers folder."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Another option of the method, as name=value with a JSON value: --method splitquant_4 "
        "--set worst=64 --set transform=affine.",
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Allocated = Annotated[
    Path,
    typer.Argument(
        help="The file to write. A table of sensitivities (.json) and a plot (.png) go beside it."
    ),
]
CalibrationFile = Annotated[
    Path, typer.Option(help="Statistics from Nibble Calibrate or `nibble calibrate`.")
]
Budget = Annotated[
    str,
    typer.Option(
        help="A3: 3 activation bits on average; W2.5: weight bits; 600MB, 6.5GB: the size of the file; "
        "0.8x or 80%: at most this cost by the "
        "speed proxy, 1x with every layer at the menu's most expensive quantized entry (int8 products; "
        "all W4A4 is 0.5x, 16 bit 2x)."
    ),
]
Menu = Annotated[
    str,
    typer.Option(
        help="robuq: its activation bits 1, 2, 3, 4 or 8. mixed: robuq, svdquant_r, W8A8 and 16 bit."
    ),
]
Gains = Annotated[
    str | None,
    typer.Option(
        help="JSON {layer: factor of its noise}, from `nibble gains`; auto: measure them as that does, "
        "SOURCE being a diffusers folder."
    ),
]
Rank = Annotated[int, typer.Option(min=0, help="Rank of the 16-bit branches.")]
Gptq = Annotated[bool, typer.Option(help="Try GPTQ rounding.")]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Spread the work over a Ray cluster: auto, its address (host:6379), or local for all CPUs and "
        "GPUs of this machine. The result is the same.",
    ),
]
RayCpus = Annotated[int, typer.Option("--ray-cpus", min=1, help="CPU threads of a task of --ray.")]
