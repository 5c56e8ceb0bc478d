"""Nibble Quantize for My Card."""

from dataclasses import replace

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io, ui

from ..quant_core.precision.wish import WISHES
from .host.kinds import Kind, kind_of
from .host.my_card import NAME, Request, quantized_for_card

AUTOMATIC = "automatic"

DESCRIPTION = (
    "Makes a model smaller by a wish: chooses how, measures, quantizes, saves the file, and says in a "
    "sentence how close it comes."
)
TOOLTIPS = {
    "model": "The full-precision model. LoRAs on it are merged and quantized with it.",
    "clip": "The model's text encoder. Or connect conditioning in its place.",
    "wish": (
        "balanced: 4 bit, close (two small models: 52, 48 dB). fast: minutes, not measured (26, 5 dB). best: "
        "closer, larger. smallest: at a clear loss (40, 34 dB). fits: the best that such a card holds."
    ),
    "prompts": "Examples to measure on, one a line, in the style you generate with. Empty: the pack's own.",
    "conditioning": "Prompts that are encoded already, in place of clip. Each entry of a list is one.",
    "negative": "For models with cfg above 1. Without it an empty prompt is taken, by clip.",
    "latent_image": "Your usual size. Without it: a size that suits the model.",
    "vae": "For the two pictures. Without it they are rough, as ComfyUI's previews are.",
    "show_before_and_after": (
        "Sample one picture with the original and one with the result, same prompt and seed."
    ),
    "before_after_prompt": "The prompt of both pictures; with conditioning connected, its first is taken.",
    "file_name": (
        "In the output folder. Empty: by model, wish and size, such as flux1-dev-balanced-6.8GB, in "
        "output/diffusion_models. Nothing is written over."
    ),
    "sampler_name": "The sampler you generate with.",
    "scheduler": "The scheduler you generate with.",
    "cfg": "Guidance you generate with. 0: as is usual for the model, 1 for FLUX.",
    "steps": "Steps you generate with. 0: as is usual for the model.",
    "seed": "Of the examples and, a thousand further, of the two pictures.",
}
OUTPUT_TOOLTIPS = {
    "model": "The quantized model; takes samplers and LoRA loaders as any other.",
    "verdict": "How close it comes, in a sentence, and what to do where it is not close.",
    "report": "What was chosen and why, and what became of each layer. Connect to Preview as Text.",
    "before_and_after": "Two pictures: the original's and the result's. Connect to Preview Image.",
}


class NibbleQuantizeForMyCard(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleQuantizeForMyCard",
            display_name=NAME,
            category="Nibble",
            description=DESCRIPTION,
            search_aliases=[
                "4bit",
                "4-bit",
                "quantize",
                "quantization",
                "compress",
                "smaller",
                "vram",
                "low vram",
                "one click",
                "fits 8 GB",
                "svdquant",
                "nf4",
            ],
            inputs=[*_sockets(), *_widgets(), *_sampling()],
            outputs=[
                io.Model.Output("model", tooltip=OUTPUT_TOOLTIPS["model"]),
                io.String.Output("verdict", tooltip=OUTPUT_TOOLTIPS["verdict"]),
                io.String.Output("report", tooltip=OUTPUT_TOOLTIPS["report"]),
                io.Image.Output("before_and_after", tooltip=OUTPUT_TOOLTIPS["before_and_after"]),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        wish: str,
        prompts: str,
        show_before_and_after: bool,
        before_after_prompt: str,
        file_name: str,
        sampler_name: str,
        scheduler: str,
        cfg: float,
        steps: int,
        seed: int,
        clip: CLIP | None = None,
        conditioning: list | None = None,
        negative: list | None = None,
        latent_image: dict | None = None,
        vae: VAE | None = None,
    ) -> io.NodeOutput:
        done = quantized_for_card(
            Request(
                model,
                wish,
                as_set(kind_of(model), sampler_name, scheduler, cfg, steps),
                clip,
                conditioning,
                negative,
                prompts,
                latent_image,
                vae,
                show_before_and_after,
                before_after_prompt,
                file_name,
                seed,
            )
        )
        shown = ui.PreviewImage(done.pictures, cls=cls).as_dict() if show_before_and_after else {}
        pictures = ["Left the original, right the result:"] * show_before_and_after
        shown["text"] = ("\n".join([done.verdict.text, f"Saved as {done.path.name}", *pictures]),)
        shown["nibble_level"] = (done.verdict.level,)
        return io.NodeOutput(done.model, done.verdict.text, done.report, done.pictures, ui=shown)


def as_set(kind: Kind, sampler: str, scheduler: str, cfg: float, steps: int) -> Kind:
    """`kind` with what the user has set, where it is not left to us."""
    return replace(
        kind,
        sampler=kind.sampler if sampler == AUTOMATIC else sampler,
        scheduler=kind.scheduler if scheduler == AUTOMATIC else scheduler,
        cfg=cfg or kind.cfg,
        steps=steps or kind.steps,
    )


def _sockets() -> list:
    return [
        io.Model.Input("model", tooltip=TOOLTIPS["model"]),
        io.Clip.Input("clip", optional=True, tooltip=TOOLTIPS["clip"]),
        io.Conditioning.Input("conditioning", optional=True, tooltip=TOOLTIPS["conditioning"]),
        io.Vae.Input("vae", optional=True, tooltip=TOOLTIPS["vae"]),
        io.Latent.Input("latent_image", optional=True, tooltip=TOOLTIPS["latent_image"]),
        io.Conditioning.Input("negative", optional=True, tooltip=TOOLTIPS["negative"]),
    ]


def _widgets() -> list:
    return [
        io.Combo.Input("wish", options=list(WISHES), default="balanced", tooltip=TOOLTIPS["wish"]),
        io.String.Input(
            "prompts",
            multiline=True,
            default="",
            placeholder="Prompts like yours, one a line. Empty: the pack's own.",
            tooltip=TOOLTIPS["prompts"],
        ),
        io.Boolean.Input("show_before_and_after", default=True, tooltip=TOOLTIPS["show_before_and_after"]),
        io.String.Input(
            "before_after_prompt",
            default="a red fox in a snowy forest, morning light",
            tooltip=TOOLTIPS["before_after_prompt"],
        ),
        io.String.Input("file_name", default="", tooltip=TOOLTIPS["file_name"]),
    ]


def _sampling() -> list:
    sampler = comfy.samplers.KSampler
    return [
        io.Combo.Input(
            "sampler_name",
            options=[AUTOMATIC, *sampler.SAMPLERS],
            default=AUTOMATIC,
            advanced=True,
            tooltip=TOOLTIPS["sampler_name"],
        ),
        io.Combo.Input(
            "scheduler",
            options=[AUTOMATIC, *sampler.SCHEDULERS],
            default=AUTOMATIC,
            advanced=True,
            tooltip=TOOLTIPS["scheduler"],
        ),
        io.Float.Input(
            "cfg", default=0.0, min=0.0, max=100.0, step=0.1, advanced=True, tooltip=TOOLTIPS["cfg"]
        ),
        io.Int.Input("steps", default=0, min=0, max=1000, advanced=True, tooltip=TOOLTIPS["steps"]),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**63,
            control_after_generate=False,
            advanced=True,
            tooltip=TOOLTIPS["seed"],
        ),
    ]
