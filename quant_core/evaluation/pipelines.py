"""Methods judged on a user's own diffusers pipeline: the same prompts and seeds in full precision and by each
quantized file, compared picture by picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ..charts.pictures import Tile, as_image, side_by_side
from ..diffusers_host.model import load, named
from ..diffusers_host.pipeline import load_pipeline
from ..store.atomic import replacing, save_text
from ..store.progress import Progress, silent
from ..store.workers import HERE, Workers
from .demo.metrics import psnr_db, ssim
from .judge import Paired, paired

FULL = "full precision"
SHARD = 4  # pictures of a task
SHOWN = 6  # pictures of the contact sheet


@dataclass
class Sampling:
    """Samples SHARD prompts, (a name of `files`, the number of the first), into `folder`, those that are
    there left out. Each process loads the pipeline once, and a quantized transformer where the name changes.

    files: {name: a Nibble file, None for the pipeline's own transformer}. seed: of the first prompt, the next
    number for each one more.
    """

    pipeline: Path
    folder: Path
    files: dict[str, Path | None]
    prompts: list[str]
    steps: int
    size: int | None
    seed: int
    device: str
    _held: dict[str, Any] = field(default_factory=dict)

    def place(self, name: str, index: int) -> Path:
        return self.folder / name.replace(" ", "_") / f"{index:05d}.npy"

    def picture(self, name: str, index: int) -> torch.Tensor:
        """(H, W, 3), fp32 in [0, 1]."""
        return torch.from_numpy(np.load(self.place(name, index), allow_pickle=False)).float()

    def __call__(self, item: tuple[str, int]) -> tuple[str, int]:
        name, first = item
        for index in range(first, min(first + SHARD, len(self.prompts))):
            if not self.place(name, index).exists():
                made = self._sampled(self._pipe(name), index)
                with replacing(self.place(name, index)) as temporary, open(temporary, "wb") as file:
                    np.save(file, made)
        return item

    def _pipe(self, name):
        if self._held.get("name") != name:
            if "pipe" not in self._held:
                pipe = load_pipeline(self.pipeline, self.device)
                part = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
                self._held |= {"pipe": pipe, "part": part, FULL: getattr(pipe, part)}
            own, path = self._held[FULL], self.files[name]
            dtype = next(own.parameters()).dtype
            made = own if path is None else load(dict(own.config), path, self.device, dtype)
            setattr(self._held["pipe"], self._held["part"], made)
            self._held["name"] = name
        return self._held["pipe"]

    @torch.no_grad()
    def _sampled(self, pipe, index) -> np.ndarray:
        """fp16, whose rounding is 83 dB below the picture."""
        takes = signature(pipe.__call__).parameters
        options: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False}
        options |= {"width": self.size, "height": self.size} if self.size else {}
        prompt = self.prompts[index]
        options |= {"class_labels": [int(prompt)]} if "class_labels" in takes else {"prompt": prompt}
        with named(self.pipeline, but=self.folder):
            made = pipe(
                **{k: v for k, v in options.items() if k in takes},
                num_inference_steps=self.steps,
                generator=torch.Generator().manual_seed(self.seed + index),
                output_type="np",
            )
        return made.images[0].astype(np.float16)


def sample_all(sampling: Sampling, progress: Progress = silent, workers: Workers = HERE, memory: int = 0):
    """Every picture of every name. memory: bytes that a task takes."""
    items = [(name, first) for name in sampling.files for first in range(0, len(sampling.prompts), SHARD)]
    told = lambda item: f"sample {sampling.pipeline.name}, {item[0]}, prompts from {item[1]}"
    for _ in progress(workers.map(sampling, items, told, lambda item: memory), len(items)):
        pass


def judged(sampling: Sampling, base: str) -> dict[str, dict]:
    """{name: {"each_psnr_db", "each_ssim", "median_psnr_db", "median_ssim", "paired"}} of all but full
    precision; paired: with `base`, None of itself."""
    count = len(sampling.prompts)
    found: dict[str, dict[str, Any]] = {}
    for name in sampling.files:
        if name != FULL:
            pairs = [_compared(sampling, name, i) for i in range(count)]  # two pictures in memory
            each, alike = ([pair[i] for pair in pairs] for i in range(2))
            found[name] = {
                "each_psnr_db": each,
                "each_ssim": alike,
                "median_psnr_db": median(each),
                "median_ssim": median(alike),
            }
    for name, figures in found.items():
        other = None if name == base else paired(found[base]["each_psnr_db"], figures["each_psnr_db"])
        figures["paired"] = None if other is None else asdict(other)
    return found


def _compared(sampling, name, index) -> tuple[float, float]:
    want, got = (sampling.picture(of, index) for of in (FULL, name))
    return psnr_db(want, got, 1.0), ssim(want[None], got[None])


def judged_text(found: dict[str, dict], base: str, sizes: dict[str, int]) -> str:
    """A line for each method, the best first. sizes: bytes of the files."""
    width = max(map(len, found))
    lines = [
        f"{'method':{width}}  {'MB':>9}  {'PSNR dB':>7}  {'SSIM':>6}  picture by picture, against {base}"
    ]
    for name in sorted(found, key=lambda n: -found[n]["median_psnr_db"]):
        row = found[name]
        against = "" if row["paired"] is None else str(Paired(**row["paired"]))
        lines.append(
            f"{name:{width}}  {sizes[name] / 1e6:9,.1f}  {row['median_psnr_db']:7.2f}  "
            f"{row['median_ssim']:6.4f}  {against}".rstrip()
        )
    return "\n".join([*lines, "Medians over the pictures; intervals hold 90 % of resamples."])


def write(sampling: Sampling, found: dict[str, dict], base: str, table: Path, sheet: Path):
    """The figures as JSON, and a contact sheet: a row for each method, full precision first."""
    about = {
        "pipeline": sampling.pipeline.name,
        "prompts": sampling.prompts,
        "steps": sampling.steps,
        "size": sampling.size,
        "seed": sampling.seed,
        "base": base,
    }
    save_text(table, json.dumps(about | {"methods": found}, indent=1) + "\n")
    rows: Sequence[Sequence[Tile]] = [
        [
            Tile(sampling.picture(name, i), name if i == 0 else "", _said(found.get(name), i))
            for i in range(min(SHOWN, len(sampling.prompts)))
        ]
        for name in sampling.files
    ]
    with replacing(sheet) as temporary:
        as_image(side_by_side(rows)[0]).save(temporary, format="PNG")


def _said(figures, index) -> tuple[str, ...]:
    return () if figures is None else (f"{figures['each_psnr_db'][index]:.1f} dB",)
