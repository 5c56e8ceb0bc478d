"""A family's model outside ComfyUI: diffusers' own class, in full precision or with the layers of a Nibble
file in place."""

import json
import re
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch

from ...kernels.operator.errors import naming
from ..calibration.file import CalibrationError
from ..families import Family, Layer
from ..families import by_name as family_by_name
from ..formats.checkpoint import Checkpoint
from ..formats.nibble import PackError, PackFile
from ..layer.linear import QuantizedLayer, QuantLinear
from ..store.safe import CheckpointError


def modules_of(family: Family, layers: list[Layer], model: torch.nn.Module) -> dict[str, list[str]]:
    """{layer: names of the modules of the diffusers model whose rows it stacks}."""
    names = family.diffusers({k: tuple(v.shape) for k, v in model.state_dict().items()})
    return {
        layer.name: [k.removesuffix(".weight") for k in names[f"{layer.name}.weight"].keys]
        for layer in layers
    }


def block_modules(names: dict[str, list[str]], plan: list[Layer]) -> dict[str, str]:
    """{block of the plan: its module in the diffusers model}, in the order of the plan. names: as
    `modules_of` gives them."""
    first: dict[str, str] = {}
    for layer in plan:
        first.setdefault(layer.block, names[layer.name][0])
    return {block: cast(re.Match, re.match(r"(.+?\.\d+)\.", name))[1] for block, name in first.items()}


def place(model: torch.nn.Module, targets: list[str], layer: QuantizedLayer):
    """Puts QuantLinear modules with the layer's rows where the model has `targets`."""
    sizes = [cast(torch.nn.Linear, model.get_submodule(t)).out_features for t in targets]
    for target, piece in zip(targets, layer.split_rows(targets, sizes), strict=True):
        parent, _, leaf = target.rpartition(".")
        model.get_submodule(parent).register_module(leaf, QuantLinear(piece))


@contextmanager
def named(path: Path, but: Path | None = None):
    """Whatever diffusers raises of a damaged or hostile folder `path` is an error that names it. Ours stay
    what they are, as do missing packages and errors of the system about `but`."""
    try:
        with naming(path, but=CalibrationError):
            yield
    except ImportError:
        raise
    except Exception as error:
        ours = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
        of_system = isinstance(error, OSError) and any(str(p) in str(error) for p in (path, but) if p)
        if ours or of_system:
            raise
        raise CheckpointError(
            f"{path}: diffusers cannot run it ({type(error).__name__}: {error}). A file in it is damaged, or "
            "made for another version of diffusers: download it again."
        ) from error


def full(folder: Path, device: str = "cpu") -> torch.nn.Module:
    """The model of a diffusers `transformer` folder in eval mode: fp32 on a CPU, bf16 elsewhere.

    Raises the errors of Checkpoint, ValueError for anything but such a folder, ImportError without diffusers.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{folder}: expected a diffusers `transformer` folder, found no config.json in it. For a "
            "single file use the ComfyUI node "
            "Nibble Allocate Bits."
        )
    made = _class(Checkpoint(folder).family)
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    frugal = find_spec("accelerate") is not None
    options = {"torch_dtype": dtype, "local_files_only": True, "low_cpu_mem_usage": frugal}
    with named(Path(folder)):
        model = made.from_pretrained(folder, use_safetensors=True, **options)
        return model.to(device).eval().requires_grad_(False)


def _config(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PackError(f"{path}: a configuration that is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise PackError(f"{path}: expected a configuration, a JSON object, found {type(found).__name__}")
    return found


def load(
    config: Path | dict, file: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """diffusers' model with the quantized layers of a Nibble file, in eval mode: for a pipeline's
    `transformer`.

    config: of the model, as a dictionary, a config.json or the folder with it; no weight but the file's is
    read. dtype: of what is not quantized, and so of the computation. Raises PackError for a file that is not
    sound or has no tensor for a parameter of the model, ImportError without diffusers.
    """
    pack = PackFile(file)
    family = family_by_name(pack.family)
    if not isinstance(config, dict):
        path = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
        config = _config(path)
    model = _empty(_class(family), config)
    theirs = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    names = family.diffusers(theirs)
    found = pack.logical_shapes()
    # FLUX's norms: `scale` in files, `weight` in ComfyUI's model, from which Nibble Save Model writes.
    names = {
        k if k in found or not k.endswith(".scale") else f"{k.removesuffix('scale')}weight": s
        for k, s in names.items()
    }
    for key, source in names.items():
        shape = (sum(theirs[k][0] for k in source.keys), *theirs[source.keys[0]][1:])
        if found.get(key) != shape:
            has = found.get(key, "no such tensor")
            raise PackError(
                f"{file}: {key}: the configuration asks for the shape {shape}, found {has}. Give the "
                "configuration of its own model."
            )
    for name in pack.specs:
        place(
            model, [k.removesuffix(".weight") for k in names[f"{name}.weight"].keys], pack.sound_layer(name)
        )
    for key in set(pack.rest) & set(names):  # ComfyUI's PixArt has tensors of its own beside
        for name, value in (
            names[key].write(pack.tensor(key).to(dtype), [theirs[k][0] for k in names[key].keys]).items()
        ):
            _assign(model, name, value)
    if left := [name for name, p in model.named_parameters() if p.is_meta]:
        raise PackError(f"{file}: no tensor for {len(left)} parameters of the model, first {left[0]}")
    return model.to(device).eval().requires_grad_(False)


def _class(family):
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            "models outside ComfyUI need diffusers: python -m pip install -e '.[calibrate]'"
        ) from error
    return getattr(diffusers, family.diffusers_class)


def _empty(made, config):
    """Parameters on the meta device; buffers as the constructor makes them, since files do not hold all of
    them."""
    real = torch.nn.Module.register_parameter

    def register(module, name, parameter):
        real(
            module,
            name,
            None if parameter is None else torch.nn.Parameter(parameter.to("meta"), requires_grad=False),
        )

    torch.nn.Module.register_parameter = register
    try:
        return made.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    finally:
        torch.nn.Module.register_parameter = real


def _assign(model, name, value):
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._buffers:
        module.register_buffer(leaf, value)
    else:
        module.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=False))
