"""Which format a file is of, from its header; and the reader of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..families import UnknownArchitecture
from ..store.safe import CheckpointError, is_gguf, open_safetensors
from . import stop
from .checkpoint import Checkpoint
from .kitchen import declared
from .kitchen.layers import runs
from .kitchen.read import KitchenFile, is_kitchen
from .kitchen.w4a8 import CORRECTION
from .nibble import PackError, PackFile
from .nunchaku.read import NunchakuFile, is_nunchaku
from .opened import Opened
from .reduced import ReducedFile
from .scaled import PACKED
from .shards import files_of

NIBBLE, KITCHEN, NUNCHAKU, FULL, CALIBRATION = "nibble", "kitchen", "nunchaku", "full", "calibration"


@dataclass(frozen=True)
class Format:
    """recognises: (path, file, keys, header entries) -> whether a file, opened as far as its header, is of
    this format. reader: path -> what was opened, as `Opened` has it."""

    recognises: Callable[..., bool]
    reader: Callable[[Path], Opened]


# Of quantized models, by the name that `kind_of` gives. A new format is a new row.
FORMATS = {
    NIBBLE: Format(lambda path, file, keys, metadata: "nibble" in metadata, PackFile),
    KITCHEN: Format(
        lambda path, file, keys, metadata: is_kitchen(keys, metadata) and _packed(file, keys, metadata),
        KitchenFile,
    ),
    NUNCHAKU: Format(lambda path, file, keys, metadata: is_nunchaku(path, keys, metadata), NunchakuFile),
}


def kind_of(path: Path) -> str:
    """A name of FORMATS, FULL or CALIBRATION. Raises CheckpointError for what cannot be read, and for files
    that declare two formats at once."""
    path = Path(path)
    first = next(iter(sorted(path.glob("*.safetensors"))), None) if path.is_dir() else path
    if first is None:
        first = files_of(path)[0]
    if is_gguf(first):
        return FULL
    file = open_safetensors(first)
    keys, metadata = list(file.keys()), file.metadata() or {}
    if "nibble" in metadata:
        keys = [k for k in keys if not k.startswith(stop.PREFIX)]
    if "nibble_calibration" in metadata:
        return CALIBRATION
    found = [name for name, one in FORMATS.items() if one.recognises(path, file, keys, metadata)]
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: declares layers as {' and as '.join(found)} does; expected one format. Download or "
            "export it again."
        )
    return found[0] if found else FULL


def _packed(file, keys, metadata) -> bool:
    """Whether there are integer weights in a format that this pack runs: fp8 and mxfp8 alone are a source to
    quantize from."""
    names = set(keys)
    weights = [k for k in keys if k.endswith(".weight") and file.get_slice(k).get_dtype() in PACKED]
    try:
        entries = declared.entries(metadata.get(declared.HEADER))
    except declared.DeclarationError:
        entries = {}
    return not all(_is_source(k.removesuffix(".weight"), file, names, entries) for k in weights)


def _is_source(name, file, keys, entries) -> bool:
    """Whether a layer is declared as one that does not run here, by a tensor or in the header's `entries`;
    broken declarations are for the readers to name."""
    beside = [leaf for leaf in (CORRECTION,) if f"{name}.{leaf}" in keys]
    marker = f"{name}.{declared.LEAF}"
    try:
        if marker in keys:
            view = file.get_slice(marker)
            read = partial(file.get_tensor, marker)
            return not runs(declared.of_tensor(tuple(view.get_shape()), view.get_dtype(), read), beside)
        # They may leave out the prefix of a whole checkpoint.
        parts = name.split(".")
        found = [raw for i in range(len(parts)) if (raw := entries.get(".".join(parts[i:]))) is not None]
        return bool(found) and not runs(declared.parse(found[0]), beside)
    except declared.DeclarationError:
        return False


def open_quantized(path: Path) -> Opened:
    """The reader of a quantized model. Raises PackError for one that is not quantized, and the errors of the
    readers."""
    kind = kind_of(path)
    if kind == FULL and (found := _below_16_bit(path)) is not None:
        return found
    if kind in (FULL, CALIBRATION):
        what = "a calibration" if kind == CALIBRATION else "not a quantized model that this pack knows"
        raise PackError(
            f"{path}: {what}. Load full-precision models with Load Diffusion Model; this pack reads its "
            "own files, ComfyUI's and "
            "comfy-kitchen's, and nunchaku's."
        )
    return FORMATS[kind].reader(path)


def _below_16_bit(path) -> ReducedFile | None:
    """A checkpoint with layers below 16 bit, None for any other. Raises CheckpointError for weights in a
    format that this pack does not read."""
    try:
        found = ReducedFile(Checkpoint(path))
    except UnknownArchitecture:
        return None
    return found if found.specs else None
