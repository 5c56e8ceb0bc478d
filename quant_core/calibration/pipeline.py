"""Calibration outside ComfyUI, with a diffusers pipeline."""

import hashlib
from inspect import signature
from pathlib import Path

import torch

from ..families import detect
from ..formats.checkpoint import Checkpoint
from .collect import calibrate
from .file import Calibration, fingerprint
from .plan import inputs_of


def calibrate_pipeline(
    pipeline: Path, folder: Path, prompts: list[str], *, samples, steps, size, seed, memory, device, progress
) -> Calibration:
    """Runs a local diffusers pipeline over the prompts with hooks on its transformer.

    Raises ImportError without diffusers, ValueError for a folder that is no pipeline, CheckpointError for one without a
    transformer in safetensors files, UnknownArchitecture for a transformer that no family knows.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError("`nibble calibrate` needs diffusers: python -m pip install -e '.[calibrate]'") from error
    if not (Path(pipeline) / "model_index.json").is_file():
        raise ValueError(
            f"{pipeline}: not a diffusers pipeline folder (no model_index.json). For a single file use the ComfyUI node Nibble Calibrate."
        )
    Checkpoint(Path(pipeline) / "transformer")  # refuses a model that `nibble quantize` could not read, before the text encoders load
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(
        pipeline, torch_dtype=torch.bfloat16 if device != "cpu" else torch.float32, local_files_only=True
    )
    if device == "cpu":
        pipe.to("cpu")
    else:
        pipe.enable_model_cpu_offload(device=device)
    pipe.set_progress_bar_config(disable=True)
    return calibrate_with(pipe, folder, prompts, samples=samples, steps=steps, size=size, seed=seed, memory=memory, progress=progress)


def calibrate_with(pipe, folder: Path, prompts, *, samples, steps, size, seed, memory, progress=lambda items, total: items) -> Calibration:
    """The same with a loaded pipeline object. size None: the size the model was made for."""
    transformer = pipe.transformer
    size = size or (getattr(pipe, "default_sample_size", None) or transformer.config.sample_size) * pipe.vae_scale_factor
    # Left alone, PixArt and Kontext sample at sizes of their own, and PixArt rewrites prompts where bs4 and ftfy are installed.
    options = {"use_resolution_binning": False, "max_area": size * size, "clean_caption": False}
    options = {k: v for k, v in options.items() if k in signature(pipe.__call__).parameters}
    state = transformer.state_dict()
    family = detect({k: tuple(v.shape) for k, v in state.items()})
    sources = family.diffusers({k: v.shape for k, v in state.items()})

    shapes = {k: (sum(state[o].shape[0] for o in s.keys), *state[s.keys[0]].shape[1:]) for k, s in sources.items()}
    layers = family.layers(shapes)
    inputs = inputs_of(layers)
    modules = {i.name: transformer.get_submodule(sources[f"{i.name}.weight"].keys[0].removesuffix(".weight")) for i in inputs}
    settings = {"steps": steps, "size": size, "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]}
    meta = {"model": fingerprint(layers, lambda key: sources[key].read(state.__getitem__)), "family": family.name, "settings": settings}

    def run(sample, capture):
        count = [0]

        def before(module, args, kwargs):
            timestep = kwargs.get("timestep")
            capture.at(count[0], float(timestep.flatten()[0]) if timestep is not None else 0.0)
            count[0] += 1
            return args, _without_padding(kwargs)

        handle = transformer.register_forward_pre_hook(before, with_kwargs=True)
        try:
            generator = torch.Generator().manual_seed(seed + sample)
            pipe(
                prompt=prompts[sample % len(prompts)],
                num_inference_steps=steps,
                width=size,
                height=size,
                generator=generator,
                output_type="latent",
                **options,
            )
        finally:
            handle.remove()

    return calibrate(run, modules, inputs, folder, meta, samples=samples, memory=memory, seed=seed, progress=progress)


def _without_padding(kwargs: dict) -> dict:
    """The transformer's arguments with the text cut to its longest unmasked prompt.

    PixArt is given 300 tokens, most of them masked: nothing depends on them and ComfyUI has none, but they would outnumber
    the text in its statistics. FLUX has no mask and does attend to its padding.
    """
    mask = kwargs.get("encoder_attention_mask")
    if mask is None:
        return kwargs
    longest = int(mask.sum(1).max())
    return kwargs | {key: kwargs[key][:, :longest] for key in ("encoder_hidden_states", "encoder_attention_mask")}
