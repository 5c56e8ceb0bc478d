"""A calibration of a model in the graph: sampled with as KSampler does, its layers' inputs watched."""

import hashlib
import logging
from pathlib import Path

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from ...quant_core import calibration
from ...quant_core.calibration import Calibration
from ...quant_core.calibration.capture import first_tensor
from ...quant_core.calibration.observe import Observation, observed
from ...quant_core.calibration.plan import HESSIAN_WIDTH, inputs_of
from ...quant_core.calibration.replay import Chained, is_chain
from .build import frame_like
from .called import linear_layers_called
from .inherited import uncompiled
from .previews import Previews
from .progress import Shown, logged
from .sampling import Sampling, latent_of, sample
from .source import ModelSource, feed


def calibrate(
    model: ModelPatcher,
    sampling: Sampling,
    samples: int,
    memory: int,
    second_moments: bool,
    shown: Shown | None = None,
) -> Calibration:
    """Samples `samples` times and keeps the statistics in the output folder; a stopped calibration of the
    same settings goes on, and one that is there is taken. memory: bytes of statistics a pass. shown: what has
    begun afterwards where anything was sampled.

    Raises the errors of ModelSource and of `calibration.calibrate`, ValueError where the model calls none of
    the layers that the rules found.
    """
    source = ModelSource(model)
    frame_like(model, source.shapes)  # what could not be quantized afterwards fails before the sampling
    latent = latent_of(model, sampling.latent)
    meta = _meta(model, source, sampling, latent, second_moments)
    key = hashlib.sha256(repr([*sorted(meta.items()), sampling.seed, samples]).encode()).hexdigest()[:12]
    folder = Path(folder_paths.get_output_directory()) / "nibble_calibration" / f"{source.family.name}-{key}"
    network, plain = source.network, uncompiled(model)
    shown = shown or Shown("Calibrating", "steps")
    previews = Previews(model)

    def progress(items, total):
        for item in items:
            comfy.model_management.throw_exception_if_processing_interrupted()
            yield item

    def run(sample, capture):
        def step(number, x0, x, total):
            shown.add(1, previews.of(sample, x0))

        with capture.watched(network, _timestep):
            _sample(plain, sampling, latent, sample, sampling.steps, step)

    def within(sample, work):
        _within(plain, sampling, latent, sample, work)
        shown.add(sampling.steps, previews.last(sample))

    plan = _observed(source, meta, lambda: _sample(plain, sampling, latent, 0, 1))
    inputs = inputs_of(plan, HESSIAN_WIDTH if second_moments else 0)
    modules = {i.name: source.modules[i.name] for i in inputs}
    options: dict = {"samples": samples, "memory": memory, "seed": sampling.seed}
    options["begin"] = lambda kept, runs: shown.begin(runs * sampling.steps, kept * sampling.steps)
    if is_chain(source.family, plan) and not _hooked(model, sampling):
        blocks = {layer.block: layer.block for layer in plan}
        options["chained"] = Chained(network, blocks, within)
    told = f"{source.family.title}, {samples} runs of {sampling.steps} steps"
    with logged("Nibble Calibrate", told):
        found = calibration.calibrate(
            run, modules, inputs, folder, meta, **options, place=_place, progress=progress
        )
    if not shown.begun:
        logging.info(f"Nibble Calibrate: was there already, with the same settings: {folder}")
    return found


def _meta(model, source, sampling, latent, second_moments) -> dict:
    digest = hashlib.sha256()
    sigmas = vars(model.get_model_object("model_sampling"))
    feed(digest, [sampling.prompts, sampling.negative, latent, sigmas])
    return {
        "model": source.fingerprint(),
        "family": source.family.name,
        "settings": sampling.settings(second_moments),
        "conditioning": digest.hexdigest()[:16],
    }


def _sample(plain, sampling, latent, run, steps, callback=None):
    with linear_layers_called():
        sample(plain, sampling, latent, run, steps, callback)


def _within(plain, sampling, latent, sample, work):
    """Calls work() where a sampler of that run would begin: the model is loaded, and its LoRAs are on it."""

    def instead(model, noise, sigmas, **options):
        work()
        return noise

    prompt = sampling.prompts[sample % len(sampling.prompts)]
    noise = comfy.sample.prepare_noise(latent, sampling.seed + sample)
    sigmas = torch.tensor([1.0, 0.0])  # nothing is denoised
    with linear_layers_called():
        comfy.sample.sample_custom(
            plain,
            noise,
            sampling.cfg,
            comfy.samplers.KSAMPLER(instead),
            sigmas,
            prompt,
            sampling.negative,
            latent,
            disable_pbar=True,
            seed=sampling.seed + sample,
        )


def _hooked(model, sampling) -> bool:
    """Whether weights change while sampling, as with a LoRA that a conditioning or a part of the steps has:
    blocks could not be run again with those of each call."""
    conditioned = [c for conditioning in (*sampling.prompts, sampling.negative) for c in conditioning]
    return any("hooks" in options for _, options in conditioned) or bool(model.hook_patches)


def _observed(source, meta, once):
    """The layers to calibrate; one step of sampling, `once`, says what the rules only guessed."""
    plan = source.layers
    if by_rule := [layer.name for layer in plan if layer.rule]:
        with Observation().watching({name: source.modules[name] for name in by_rule}) as seen:
            once()
        meta["observed"] = seen.to_json()
        plan = observed(plan, meta["observed"])
        if not plan:
            raise ValueError(
                "Nibble Calibrate: the model called none of its linear layers in repeated blocks; there is "
                "nothing to quantize"
            )
    return plan


def _place(nbytes):
    device = comfy.model_management.get_torch_device()
    if not comfy.model_management.is_device_cpu(device):
        comfy.model_management.free_memory(nbytes + 2**29, device)
    return device


def _timestep(args, kwargs) -> float:
    """Of network(x, timestep, ...). LTX-2 is given one for video and one for sound, and image to video one a
    frame, of which those that are given have 0: the largest is that of the step."""
    return float(first_tensor(args[1]).max())
