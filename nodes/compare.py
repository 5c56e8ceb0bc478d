"""Nibble Compare."""

from dataclasses import dataclass

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io, ui

from ..quant_core.charts.pictures import Tile, amplification, colored, difference, side_by_side, strip_of
from ..quant_core.charts.style import THEMES, Theme
from ..quant_core.evaluation.demo import metrics
from .host.comparing import NAME, Sampled, sampled
from .host.sampling import Sampling

DESCRIPTION = (
    "Samples with two or three models from the same noise and prompt, and shows the pictures side by side, "
    "with their difference and figures."
)
TOOLTIPS = {
    "model_a": "The reference: the full-precision model.",
    "model_b": "The model to look at: the quantized one.",
    "model_c": "A third one, such as another method.",
    "positive": "The prompt, for all of them.",
    "negative": "The negative prompt. Needed where cfg is not 1.",
    "latent_image": "Size and kind of the latents to sample, as for KSampler.",
    "vae": "Decodes the pictures. Without it a rough preview of the latents is shown.",
    "sampler_name": "The sampler you generate with.",
    "scheduler": "The scheduler you generate with.",
    "steps": "Steps of each model.",
    "cfg": "Guidance; 1 for FLUX.",
    "seed": "The same noise for all of them.",
    "theme": "Behind the pictures: dark fits ComfyUI, light fits a page.",
}
OUTPUT_TOOLTIPS = {
    "picture": "Side by side, with names, figures and differences.",
    "pictures": "The pictures as they are: of A, then of B, then of C.",
    "difference": "How far B, and C, are from A, amplified.",
    "figures": "A table. Connect to Preview as Text and switch it to Markdown.",
    "image_a": "A's picture, for ComfyUI's Compare Images, which has a slider.",
    "image_b": "B's picture, for ComfyUI's Compare Images.",
}

LEGEND = (
    "Difference, black: none.",
    "",
    "35 dB: hard to tell apart.",
    "30 dB: other details.",
    "20 dB: clearly different.",
    "SSIM 1: the same.",
)


@dataclass(frozen=True)
class Figures:
    """Against the reference. latent_db and image_db: PSNR; ssim: 1 is the same; detail: energy of high
    frequencies, 1 is the same."""

    latent_db: float
    image_db: float
    ssim: float
    detail: float


class NibbleCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        sampler = comfy.samplers.KSampler
        tip = lambda name: {"tooltip": TOOLTIPS[name]}
        out = lambda name: {"tooltip": OUTPUT_TOOLTIPS[name]}
        return io.Schema(
            node_id="NibbleCompare",
            display_name=NAME,
            category="Nibble",
            description=DESCRIPTION,
            search_aliases=[
                "before after",
                "side by side",
                "difference",
                "psnr",
                "ssim",
                "slider",
                "quality",
            ],
            inputs=[
                io.Model.Input("model_a", **tip("model_a")),
                io.Model.Input("model_b", **tip("model_b")),
                io.Model.Input("model_c", optional=True, **tip("model_c")),
                io.Conditioning.Input("positive", **tip("positive")),
                io.Conditioning.Input("negative", optional=True, **tip("negative")),
                io.Latent.Input("latent_image", **tip("latent_image")),
                io.Vae.Input("vae", optional=True, **tip("vae")),
                io.Combo.Input(
                    "sampler_name", options=sampler.SAMPLERS, default="euler", **tip("sampler_name")
                ),
                io.Combo.Input("scheduler", options=sampler.SCHEDULERS, default="simple", **tip("scheduler")),
                io.Int.Input("steps", default=20, min=1, max=1000, **tip("steps")),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, **tip("cfg")),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**64 - 1, control_after_generate=False, **tip("seed")
                ),
                io.Combo.Input("theme", options=list(THEMES), default="dark", **tip("theme")),
            ],
            outputs=[
                io.Image.Output("picture", **out("picture")),
                io.Image.Output("pictures", **out("pictures")),
                io.Image.Output("difference", **out("difference")),
                io.String.Output("figures", **out("figures")),
                io.Image.Output("image_a", **out("image_a")),
                io.Image.Output("image_b", **out("image_b")),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model_a: ModelPatcher,
        model_b: ModelPatcher,
        positive: list,
        latent_image: dict,
        sampler_name: str,
        scheduler: str,
        steps: int,
        cfg: float,
        seed: int,
        theme: str,
        model_c: ModelPatcher | None = None,
        negative: list | None = None,
        vae: VAE | None = None,
    ) -> io.NodeOutput:
        if negative is None and cfg != 1.0:
            raise ValueError(
                f"{NAME}: 'cfg' is {cfg:g} and 'negative' is not connected. Connect a negative prompt, or "
                "set cfg to 1."
            )
        negative = positive if negative is None else negative
        models = [model for model in (model_a, model_b, model_c) if model is not None]
        sampling = Sampling([positive], negative, latent_image, sampler_name, scheduler, steps, cfg, seed)
        runs = sampled(models, sampling, vae)
        found = [figures_of(runs[0], run) for run in runs[1:]]
        picture, apart = shown(runs, found, THEMES[theme], vae is not None)
        flat = [run.pictures.reshape(-1, *run.pictures.shape[-3:]) for run in runs]
        return io.NodeOutput(
            picture,
            torch.cat(flat),
            apart,
            figures_text(runs, found, vae is not None),
            flat[0],
            flat[1],
            ui=ui.PreviewImage(picture, cls=cls),
        )


def figures_of(reference: Sampled, test: Sampled) -> Figures:
    """How far a run is from the reference's, over all pictures and frames of it."""
    a, b = (run.pictures.reshape(-1, *run.pictures.shape[-3:]) for run in (reference, test))
    return Figures(
        metrics.latent_psnr_db(reference.latents.float(), test.latents.float()),
        metrics.psnr_db(a, b, 1.0),
        metrics.ssim(a, b),
        metrics.high_frequency_ratio(a, b),
    )


def shown(
    runs: list[Sampled], found: list[Figures], theme: Theme, decoded: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the pictures of the first of the batch side by side, above their differences (1, H, W, 3); those
    differences (n, H, W, 3))."""
    views = [_view(run) for run in runs]
    apart = [difference(views[0], view) for view in views[1:]]
    times = amplification(apart)
    maps = [colored(d, times) for d in apart]
    what = ("the reference",) if decoded else ("the reference", "preview, no VAE")
    first = Tile(views[0], runs[0].name, (*what, f"{runs[0].seconds:.1f} s"))
    tops = [
        Tile(
            view,
            run.name,
            (
                f"{f.image_db:.1f} dB, SSIM {f.ssim:.3f}",
                *(f"fine detail {100 * f.detail:.0f} %",) * decoded,
                f"{run.seconds:.1f} s",
            ),
        )
        for view, run, f in zip(views[1:], runs[1:], found, strict=True)
    ]
    names = [f"{run.name[0]} against A, {times} times" for run in runs[1:]]
    lows = [Tile(picture, name) for picture, name in zip(maps, names, strict=True)]
    return side_by_side([[first, *tops], [Tile(None, "", LEGEND), *lows]], theme), torch.stack(maps)


def _view(run: Sampled) -> torch.Tensor:
    """The first picture of the batch; of a video a strip of frames."""
    first = run.pictures[0]
    return strip_of(first) if first.ndim == 4 else first


def figures_text(runs: list[Sampled], found: list[Figures], decoded: bool) -> str:
    """A Markdown table, a column for each model against A, and what its lines mean."""
    rows = [
        ("Picture, PSNR", [f"{f.image_db:.1f} dB" for f in found]),
        ("Picture, SSIM", [f"{f.ssim:.3f}" for f in found]),
        # A rough preview has none to compare.
        *[("Fine detail", [f"{100 * f.detail:.0f} %" for f in found])] * decoded,
        ("Latent, PSNR", [f"{f.latent_db:.1f} dB" for f in found]),
        (f"Seconds (A: {runs[0].seconds:.1f})", [f"{run.seconds:.1f}" for run in runs[1:]]),
    ]
    lines = [f"| Against {runs[0].name} | {' | '.join(run.name for run in runs[1:])} |"]
    lines.append(f"|{' --- |' * len(runs)}")
    lines += [f"| {name} | {' | '.join(values)} |" for name, values in rows]
    lines += [
        "",
        "- PSNR: 35 dB and more is hard to tell apart, 30 dB has other details, 20 dB is clearly different.",
        "- SSIM: likeness of structure, 1 is the same.",
        *["- Fine detail: below 100 % blur, above it grain."] * decoded,
        "- Seconds: with the loading of the model.",
    ]
    return "\n".join(lines if decoded else [*lines, "- The picture is a rough preview: no VAE is connected."])
