"""Calibration outside ComfyUI, with a diffusers pipeline."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from math import prod
from pathlib import Path

import torch

from ..calibration.collect import calibrate
from ..calibration.file import Calibration
from ..calibration.plan import Input, inputs_of
from ..calibration.prompts import default_prompts
from ..calibration.replay import Chained, is_chain
from ..families import GENERIC, Family, UnknownArchitecture, detect
from ..families.fingerprint import fingerprint
from ..formats.checkpoint import Checkpoint
from ..formats.pipeline_folder import require_safetensors
from ..store.atomic import require_folder
from ..store.progress import Progress, silent
from .model import block_modules, modules_of, named


def calibrate_pipeline(
    pipeline: Path,
    folder: Path,
    prompts: list[str] | None,
    *,
    samples,
    steps,
    size,
    seed,
    memory,
    device,
    progress,
    say: Callable[[str], None] = logging.info,
) -> Calibration:
    """Runs a local diffusers pipeline over the prompts with hooks on its transformer or U-Net.

    prompts: class ids or labels where the pipeline takes classes; None: the prompts of the pack, or ids
    evenly over the classes. Raises ImportError without diffusers, ValueError for a folder that is no
    pipeline, CheckpointError for one without a transformer in safetensors files, with another component in
    pickled ones or with anything that diffusers cannot load or run, UnknownArchitecture for a transformer
    that no family knows.
    """
    require_folder(folder)
    pipe = load_pipeline(pipeline, device)
    asked = {"samples": samples, "steps": steps, "size": size, "seed": seed, "memory": memory}
    with named(Path(pipeline), but=Path(folder)):
        return calibrate_with(pipe, folder, prompts, **asked, progress=progress, say=say)


def load_pipeline(pipeline: Path, device: str = "auto"):
    """A diffusers pipeline of a local folder: fp32 on a CPU, else bf16 and on the device a part at a time.
    Raises what `calibrate_pipeline` does before it samples, ValueError for a transformer that the GPU cannot
    hold."""
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError(
            "`nibble calibrate` needs diffusers: python -m pip install -e '.[calibrate]'"
        ) from error
    if not (Path(pipeline) / "model_index.json").is_file():
        raise ValueError(
            f"{pipeline}: not a diffusers pipeline folder (no model_index.json). For a single file use the "
            "ComfyUI node Nibble Calibrate."
        )
    require_safetensors(Path(pipeline))
    # Refuses a model that `nibble quantize` could not read, before the text encoders load.
    checkpoint = Checkpoint(pipeline)
    _mapped(checkpoint.family)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _require_gpu(checkpoint, device)
    with named(Path(pipeline)):
        pipe = DiffusionPipeline.from_pretrained(
            pipeline,
            torch_dtype=torch.bfloat16 if device != "cpu" else torch.float32,
            local_files_only=True,
            use_safetensors=True,
        )
        if device == "cpu":
            pipe.to("cpu")
        else:
            pipe.enable_model_cpu_offload(device=device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gpu_bytes(device: str) -> int | None:
    """Memory of a GPU; None where there is none of this name."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).total_memory


def _require_gpu(checkpoint: Checkpoint, device: str):
    """While it samples, all of the transformer is on the GPU: without room for it the first step would end
    in the middle, after minutes of loading."""
    needed, there = 2 * sum(map(prod, checkpoint.shapes.values())), gpu_bytes(device)
    if there is not None and needed > there:
        raise ValueError(
            f"{checkpoint.path}: its transformer takes {needed / 1e9:.1f} GB in bf16, and the GPU {device} "
            f"has {there / 1e9:.1f} GB. Take a GPU that holds it, --device cpu, or calibrate in ComfyUI with "
            "the node Nibble Calibrate, where a part of the model is enough on the GPU."
        )


def pipeline_bytes(pipeline: Path, device: str) -> int:
    """Memory that a loaded pipeline takes, at the most: fp32 on a CPU, and what sampling keeps."""
    files = sum(path.stat().st_size for path in pipeline.rglob("*.safetensors"))
    return (3 if device == "cpu" else 2) * files


def calibrate_with(
    pipe,
    folder: Path,
    prompts,
    *,
    samples,
    steps,
    size,
    seed,
    memory,
    progress: Progress = silent,
    say: Callable[[str], None] = logging.info,
) -> Calibration:
    """The same with a loaded pipeline object. size None: the size the model was made for.

    Raises ValueError for a class that the model does not have, and for another size where it has but one.
    """
    takes = signature(pipe.__call__).parameters
    transformer = pipe.transformer if getattr(pipe, "transformer", None) is not None else pipe.unet
    size = _size(pipe, transformer, size)
    by_class = "class_labels" in takes
    prompts = class_ids(pipe, prompts, samples) if by_class else prompts or default_prompts()
    # Left alone, PixArt and Kontext sample at sizes of their own, and PixArt rewrites prompts where bs4 and
    # ftfy are installed.
    options = {"use_resolution_binning": False, "clean_caption": False}
    options |= {"max_area": size * size, "width": size, "height": size} if size else {}
    options = {k: v for k, v in options.items() if k in takes}
    plan = _plan(transformer)
    settings = {
        "steps": steps,
        "size": size,
        "prompts": hashlib.sha256("\n".join(map(str, prompts)).encode()).hexdigest()[:16],
    }
    meta = {"model": plan.fingerprint, "family": plan.family.name, "settings": settings}

    def run(sample, capture):
        with capture.watched(transformer, _timestep, _without_padding):
            prompt = prompts[sample % len(prompts)]
            pipe(
                **({"class_labels": [prompt]} if by_class else {"prompt": prompt}),
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed + sample),
                output_type="latent",
                **options,
            )

    return calibrate(
        run,
        plan.modules,
        plan.inputs,
        folder,
        meta,
        samples=samples,
        memory=memory,
        seed=seed,
        progress=progress,
        chained=plan.chained,
        say=say,
    )


@dataclass(frozen=True)
class _Plan:
    """What is observed of a diffusers model: its inputs, and the module that each belongs to."""

    family: Family
    inputs: list[Input]
    modules: dict[str, torch.nn.Module]
    fingerprint: str
    chained: Chained | None


def _plan(transformer) -> _Plan:
    state = transformer.state_dict()
    family = _mapped(detect({k: tuple(v.shape) for k, v in state.items()}))
    sources = family.diffusers({k: v.shape for k, v in state.items()})
    shapes = {
        k: (sum(state[o].shape[0] for o in s.keys), *state[s.keys[0]].shape[1:]) for k, s in sources.items()
    }
    layers = family.mapped(shapes)  # the rules beside it want an observation, which only ComfyUI's node makes
    inputs = inputs_of(layers)
    modules = {
        i.name: transformer.get_submodule(sources[f"{i.name}.weight"].keys[0].removesuffix(".weight"))
        for i in inputs
    }
    chained = None
    if is_chain(family, layers):
        chained = Chained(transformer, block_modules(modules_of(family, layers, transformer), layers))
    made_of = fingerprint(layers, lambda key: sources[key].read(state.__getitem__))
    return _Plan(family, inputs, modules, made_of, chained)


def _size(pipe, transformer, size):
    """The size to sample at: the one asked for, or the model's own; None where it has a width and a
    height."""
    scale = getattr(pipe, "vae_scale_factor", None) or 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    latents = getattr(pipe, "default_sample_size", None) or transformer.config.get("sample_size")
    # Video pipelines have a width and a height of their own.
    own = latents * scale if isinstance(latents, int) else None
    if size and size != own and "width" not in signature(pipe.__call__).parameters:
        raise ValueError(
            f"{type(pipe).__name__} samples at {own} x {own} only, not at {size}; leave --size out"
        )
    return size or own


def _mapped(family):
    if family is GENERIC:
        raise UnknownArchitecture(
            "a diffusers model that no family has a map of: ComfyUI's names of its layers are not known. "
            "Calibrate it in ComfyUI, with the "
            "node Nibble Calibrate."
        )
    return family


def _timestep(args, kwargs) -> float:
    """Transformers get it by name, U-Nets as their second argument."""
    return float(torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).flatten()[0])


def class_ids(pipe, lines: list[str] | None, samples: int) -> list[int]:
    """Ids of the classes that lines name by id or label; of None as many as samples, evenly spread. Raises
    ValueError naming the line."""
    count = pipe.transformer.config.num_embeds_ada_norm
    if lines is None:
        return [i * count // samples for i in range(samples)]
    labels = {str(i): i for i in range(count)} | getattr(pipe, "labels", {})
    for line in lines:
        if line not in labels:
            raise ValueError(
                f"prompt {line!r}: expected a class id from 0 to {count - 1} or a label of the pipeline, "
                f"such as {list(labels)[-1]!r}"
            )
    return [labels[line] for line in lines]


def _without_padding(kwargs: dict) -> dict:
    """The transformer's arguments with the text cut to its longest unmasked prompt.

    PixArt is given 300 tokens, most of them masked: nothing depends on them and ComfyUI has none, but they
    would outnumber the text in its statistics. FLUX has no mask and does attend to its padding.
    """
    mask = kwargs.get("encoder_attention_mask")
    if mask is None:
        return kwargs
    longest = int(mask.sum(1).max())
    return kwargs | {
        key: kwargs[key][:, :longest] for key in ("encoder_hidden_states", "encoder_attention_mask")
    }
