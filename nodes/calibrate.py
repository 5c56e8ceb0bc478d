"""Nibble Calibrate and Nibble Calibration Prompts."""

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ..quant_core.calibration.prompts import default_prompts
from .host.calibrating import calibrate
from .host.progress import steps as progress_steps
from .host.sampling import Sampling
from .host.types import CalibrationType

CALIBRATE_DESCRIPTION = (
    "Samples with the model and gathers statistics of its layers' inputs, for Nibble Quantize. Stopped runs "
    "go on where they were."
)
CALIBRATE_TOOLTIPS = {
    "model": "The full-precision model, with the LoRAs that you want to be quantized into it.",
    "positive": "Prompts to calibrate on. Each entry of a list counts as one prompt.",
    "negative": "Negative prompt, for models that use cfg above 1.",
    "latent_image": (
        "Size and kind of the latents to sample, as for KSampler. Your usual size is best; half of it is "
        "enough."
    ),
    "sampler_name": "The sampler you generate with.",
    "scheduler": "The scheduler you generate with.",
    "steps": "Steps of each sampling run. About half of what you generate with is enough.",
    "cfg": "Guidance; 1 for FLUX.",
    "seed": "Seed of the first run; each further run adds 1.",
    "samples": "Sampling runs, over the prompts in turn. Every fourth is held out to judge by.",
    "memory_gb": (
        "Memory for the statistics of one pass, mostly on the graphics card. A smaller value takes more "
        "passes and more time: FLUX.1 at 4 GB takes 6 passes, the work of 1.9."
    ),
    "second_moments": (
        "Gather X^T X for GPTQ and the whitened low rank. Off: fewer passes and 7 times smaller statistics "
        "(3 GB instead of 22 GB for FLUX.1), but neither GPTQ nor whitening."
    ),
}
CALIBRATE_OUTPUT_TOOLTIPS = {
    "calibration": "Connect to Nibble Quantize.",
}


class NibbleCalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        tips, sampler = CALIBRATE_TOOLTIPS, comfy.samplers.KSampler
        return io.Schema(
            node_id="NibbleCalibrate",
            display_name="Nibble Calibrate",
            category="Nibble/advanced",
            description=CALIBRATE_DESCRIPTION,
            search_aliases=["calibration", "quantization", "svdquant", "imatrix"],
            inputs=[
                io.Model.Input("model", tooltip=tips["model"]),
                io.Autogrow.Input(
                    "conditioning",
                    template=io.Autogrow.TemplatePrefix(
                        io.Conditioning.Input("positive", tooltip=tips["positive"]),
                        prefix="positive",
                        min=1,
                        max=16,
                    ),
                ),
                io.Conditioning.Input("negative", optional=True, tooltip=tips["negative"]),
                io.Latent.Input("latent_image", tooltip=tips["latent_image"]),
                io.Combo.Input(
                    "sampler_name", options=sampler.SAMPLERS, default="euler", tooltip=tips["sampler_name"]
                ),
                io.Combo.Input(
                    "scheduler", options=sampler.SCHEDULERS, default="simple", tooltip=tips["scheduler"]
                ),
                io.Int.Input("steps", default=12, min=1, max=1000, tooltip=tips["steps"]),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip=tips["cfg"]),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip=tips["seed"],
                ),
                io.Int.Input("samples", default=16, min=1, max=4096, tooltip=tips["samples"]),
                io.Float.Input(
                    "memory_gb",
                    default=4.0,
                    min=0.1,
                    max=512.0,
                    step=0.1,
                    advanced=True,
                    tooltip=tips["memory_gb"],
                ),
                io.Boolean.Input(
                    "second_moments",
                    default=True,
                    advanced=True,
                    tooltip=tips["second_moments"],
                ),
            ],
            outputs=[CalibrationType.Output("calibration", tooltip=CALIBRATE_OUTPUT_TOOLTIPS["calibration"])],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        conditioning: dict,
        latent_image: dict,
        sampler_name: str,
        scheduler: str,
        steps: int,
        cfg: float,
        seed: int,
        samples: int,
        memory_gb: float,
        second_moments: bool,
        negative: list | None = None,
    ) -> io.NodeOutput:
        prompts = [
            [entry] for name in sorted(conditioning, key=_number) for entry in (conditioning[name] or [])
        ]
        if not prompts:
            raise ValueError(
                "Nibble Calibrate: no conditioning connected; connect a text encoder or Nibble Calibration "
                "Prompts"
            )
        if negative is None and cfg != 1.0:
            raise ValueError(
                f"Nibble Calibrate: cfg is {cfg:g} and no negative conditioning is connected; connect one, "
                "or set cfg to 1"
            )
        if negative is None:
            negative = [[torch.zeros_like(prompts[0][0][0]), prompts[0][0][1]]]
        sampling = Sampling(prompts, negative, latent_image, sampler_name, scheduler, steps, cfg, seed)
        return io.NodeOutput(calibrate(model, sampling, samples, int(memory_gb * 2**30), second_moments))


PROMPTS_DESCRIPTION = (
    "Encodes a list of prompts, one a line, for Nibble Calibrate. A list of 64 comes with the pack."
)
PROMPTS_TOOLTIPS = {
    "clip": "The model's text encoder.",
    "prompts": "One prompt a line, in the style you generate with. Empty: the 64 prompts of the pack.",
    "count": "How many to encode, from the top. As many as Nibble Calibrate has samples.",
}
PROMPTS_OUTPUT_TOOLTIPS = {
    "conditioning": "One entry a prompt. Connect to Nibble Calibrate.",
}


class NibbleCalibrationPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleCalibrationPrompts",
            display_name="Nibble Calibration Prompts",
            category="Nibble/advanced",
            description=PROMPTS_DESCRIPTION,
            search_aliases=["calibration", "prompts"],
            inputs=[
                io.Clip.Input("clip", tooltip=PROMPTS_TOOLTIPS["clip"]),
                io.String.Input("prompts", multiline=True, default="", tooltip=PROMPTS_TOOLTIPS["prompts"]),
                io.Int.Input("count", default=16, min=1, max=4096, tooltip=PROMPTS_TOOLTIPS["count"]),
            ],
            outputs=[io.Conditioning.Output("conditioning", tooltip=PROMPTS_OUTPUT_TOOLTIPS["conditioning"])],
        )

    @classmethod
    def execute(cls, clip: CLIP, prompts: str, count: int) -> io.NodeOutput:
        lines = [line.strip() for line in prompts.splitlines() if line.strip()] or default_prompts()
        lines = lines[:count]
        out = []
        for line in progress_steps(lines, len(lines)):
            out += clip.encode_from_tokens_scheduled(clip.tokenize(line))
        return io.NodeOutput(out)


def _number(name: str) -> int:
    return int("".join(c for c in name if c.isdigit()) or 0)
