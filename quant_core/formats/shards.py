"""Which files a checkpoint consists of. Names in an index are untrusted: they must be plain names of files
beside it."""

import json
import re
from pathlib import Path

from ..store.safe import CheckpointError, require_little_memory

INDEX = ".safetensors.index.json"
INDEX_BYTES = 32 * 2**20  # FLUX's index has 120 kB
# What torch.save's files are called; to open one may run code.
PICKLED = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def files_of(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one file; a shard, which stands for all of its set; a folder
    with one file or a set of shards, with or without an index; a diffusers pipeline folder, whose
    `transformer` or `unet` it is.

    Raises CheckpointError naming what is missing.
    """
    path = Path(path)
    if not path.is_dir():
        match = _SHARD.fullmatch(path.name)
        return _set(path.parent, match[1], int(match[3])) if match else [path]
    if (path / "model_index.json").is_file():
        inner = next((path / name for name in ("transformer", "unet") if (path / name).is_dir()), None)
        if inner is None:
            raise CheckpointError(f"{path}: a diffusers pipeline without a `transformer` or `unet` folder")
        return files_of(inner)
    indexes = sorted(path.glob(f"*{INDEX}"))
    plain = [
        p for p in indexes if p.name.count(".") == INDEX.count(".")
    ]  # not model.fp16.safetensors.index.json
    if chosen := (plain or indexes):
        return _indexed(chosen[0])
    found = sorted(path.glob("*.safetensors"))
    sets = {(m[1], int(m[3])) for p in found if (m := _SHARD.fullmatch(p.name))}
    if len(sets) == 1 and all(_SHARD.fullmatch(p.name) for p in found):
        return _set(path, *sets.pop())
    if not found:
        require_no_pickles(path)
        raise CheckpointError(f"{path}: a folder without .safetensors files")
    return found


def require_no_pickles(folder: Path):
    """Raises CheckpointError naming the first pickled file of weights in a folder that has none in
    safetensors; they are never opened."""
    if any(folder.glob("*.safetensors")) or not folder.is_dir():
        return
    if pickled := sorted(p for p in folder.iterdir() if p.suffix.lower() in PICKLED):
        raise CheckpointError(
            f"{pickled[0]}: pickled weights, which can run code when opened, and no .safetensors file "
            "beside them. Save the model again with "
            "save_pretrained(folder, safe_serialization=True), or download its .safetensors files."
        )


def _set(folder, stem, count):
    names = [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return _present(folder, names, f"its set has {count} shards")


def _present(folder, names, why):
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} files are missing, first {missing[0]} ({why}). "
            "Download the rest."
        )
    return [folder / name for name in names]


def _indexed(index):
    size = index.stat().st_size
    if size > INDEX_BYTES:
        raise CheckpointError(f"{index}: {size} bytes, expected an index of at most {INDEX_BYTES}")
    text = index.read_bytes()
    require_little_memory(index, text, "JSON")
    try:
        names = set(json.loads(text.decode())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index}: expected JSON with a weight_map {{tensor: file}} ({type(error).__name__}: {error})"
        ) from error
    if not names:
        raise CheckpointError(f"{index}: weight_map: expected names of .safetensors files, found none")
    for name in names:
        if (
            not isinstance(name, str)
            or not name.endswith(".safetensors")
            or Path(name).name != name
            or "\\" in name
        ):
            raise CheckpointError(
                f"{index}: weight_map: expected names of .safetensors files beside it, found "
                f"{str(name)[:80]!r}"
            )
    return _present(index.parent, sorted(names), f"{index.name} names them")
