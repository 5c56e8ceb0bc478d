"""What nodes that write a model share: what may be written, where, and from which tensors."""

from itertools import chain, count
from pathlib import Path

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from ...quant_core.formats import nibble
from ...quant_core.formats.opened import Opened
from ...quant_core.layer.linear import QuantizedLayer
from .adapters import Shape
from .build import ATTACHMENT, unpatched
from .origin import as_sampled
from .patcher import NibblePatcher


class LoadedModel(Opened):
    """A loaded model as the source of a conversion."""

    kind = "the model in the graph"

    def __init__(self, model: NibblePatcher, path: Path) -> None:
        info = model.attachments[ATTACHMENT]
        self._layers, self._rest = unpatched(model)
        self.path, self.family, self.provenance, self.report = (
            path,
            info["family"],
            info["provenance"],
            info["report"],
        )
        self.origin = as_sampled(model, info["origin"])
        self.specs = {name: layer.spec for name, layer in self._layers.items()}
        self.rest = list(self._rest)

    def layer(self, name: str) -> QuantizedLayer:
        return self._layers[name]

    @property
    def files(self) -> list[Path]:
        return []

    def tensor(self, key: str) -> torch.Tensor:
        return narrow(self._rest[key])

    def shape(self, key: str) -> Shape:
        return tuple(self._rest[key].shape)


def require_savable(model: ModelPatcher, node: str) -> None:
    """Raises ValueError, naming the node, where a file would lose something of the model."""
    if not isinstance(model, NibblePatcher):
        raise ValueError(
            f"{node}: the model was not quantized by Nibble. Connect the output of Nibble Quantize, or use "
            "ComfyUI's own save nodes."
        )
    if model.patches:
        raise ValueError(
            f"{node}: {len(model.patches)} layers carry LoRA patches, which this file would lose. Put Nibble "
            "Bake LoRA in between to write them into the layers, or save before the LoRA loader."
        )
    if model.injections:
        raise ValueError(
            f"{node}: the model has injections ({', '.join(model.injections)}), such as a bypass LoRA loader "
            "makes, which this file would lose. Save before that node, or load the LoRA with "
            "LoraLoaderModelOnly and bake it."
        )


def save_model(model: NibblePatcher, path: Path, base3: bool = False) -> None:
    """Writes a model that `require_savable` took to a path of its own."""
    info = model.attachments[ATTACHMENT]
    layers, rest = unpatched(model)
    rest = {k: narrow(t) for k, t in rest.items()}
    origin = as_sampled(model, info["origin"])
    nibble.save(path, layers, rest, info["family"], info["provenance"], info["report"], base3, origin)


def named_path(name: str, folder: str = "diffusion_models") -> Path:
    """A path in the output folder that no file has yet, numbered only where the name is taken. name: with or
    without a folder and an ending; in `folder` where it has none. Raises ValueError for one that leads out of
    the output folder."""
    plain = name.replace("\\", "/").removesuffix(".safetensors")
    output = Path(folder_paths.get_output_directory()).resolve()
    path = (output / (plain if "/" in plain else f"{folder}/{plain}")).resolve()
    if not path.is_relative_to(output) or not path.name or plain.endswith("/"):
        raise ValueError(
            f"file_name {name!r}: expected a name, or a folder and a name, within ComfyUI's output folder, "
            "such as my-model or diffusion_models/my-model"
        )
    stems = chain([path.name], (f"{path.name}-{number}" for number in count(2)))
    paths = (path.with_name(f"{stem}.safetensors") for stem in stems)
    return next(p for p in paths if not p.exists())


def free_path(filename_prefix: str) -> Path:
    """A path in the output folder that no file has yet. ComfyUI counts for names alone: of an empty one,
    "folder/", it says 1 each time."""
    folder, name, first, _, _ = folder_paths.get_save_image_path(
        filename_prefix, folder_paths.get_output_directory()
    )
    paths = (Path(folder) / f"{name}_{number:05}_.safetensors" for number in count(first))
    return next(path for path in paths if not path.exists())


def narrow(tensor: torch.Tensor) -> torch.Tensor:
    """bf16 where that is exact: ComfyUI on a CPU holds bf16 files in fp32."""
    if tensor.dtype == torch.float32 and torch.equal(tensor.bfloat16().float(), tensor):
        return tensor.bfloat16()
    return tensor
