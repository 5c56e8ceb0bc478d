"""What the trainings of the small models share: where a model starts, its moving average, its file, and a
training that follows the clock and can be stopped."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.evaluation.demo.model import SmallModel
from comfyui_nibble.quant_core.store.atomic import replacing


def start_at_identity(model: torch.nn.Module) -> None:
    """adaLN and the last layer start at zero, as in the original training of DiT models."""
    for name, parameter in model.named_parameters():
        modulation = "norm" in name and name.endswith(("linear.weight", "linear.bias"))
        if modulation or name.startswith("proj_out"):
            torch.nn.init.zeros_(parameter)


@torch.no_grad()
def follow(average: dict, model: torch.nn.Module, step: int, decay: float = 0.998) -> None:
    """Moves the average a little towards the model's weights, further in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    for key, value in model.state_dict().items():
        average[key].lerp_(value, 1 - decay)


def save(out: Path, small: SmallModel, average: dict, meta: dict) -> None:
    """The average in bfloat16, in ComfyUI's key names."""
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in small.from_diffusers(average).items()}
    with replacing(out) as temporary:
        save_file(state, temporary, metadata={"training": json.dumps(meta)})


@dataclass(frozen=True)
class Stage:
    """Until this share of the time a step sees so many tokens of so many pictures, and the average of the
    weights decays so slowly. Few tokens cost little and teach as much a step; but only with all of them does
    attention come to what it is in sampling."""

    until: float
    tokens: int
    pictures: int
    decay: float


class Training:
    """Weights, their average and the optimizer's state, and where in its time the training is. `model`: where
    it starts; a stopped run goes on from its state beside the result."""

    def __init__(self, out: Path, small: SmallModel, model: torch.nn.Module, peak_rate: float):
        self.out, self.state, self.peak_rate = out, out.with_name(f"{out.name}.state"), peak_rate
        self.small, self.model = small, model
        self.average = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.step, self.seconds, self.loss = 0, 0.0, float("nan")
        if self.state.exists():
            kept = torch.load(self.state, weights_only=True)
            self.model.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.average, self.step, self.seconds = kept["average"], kept["step"], kept["seconds"]

    def take(self, loss: torch.Tensor, done: float, decay: float) -> None:
        """A step down, `done` of the time being over."""
        rate = min(1, (self.step + 1) / 60) * (0.02 + 0.98 * min(1, (1 - done) / 0.7))
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_rate * rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        follow(self.average, self.model, self.step, decay)
        self.loss = loss.item() if self.step == 0 else 0.98 * self.loss + 0.02 * loss.item()
        self.step += 1

    def keep(self, seconds: float, meta: dict) -> None:
        """Writes the result so far and what a stopped run goes on from."""
        save(self.out, self.small, self.average, meta | {"steps": self.step, "loss": round(self.loss, 5)})
        kept = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        with replacing(self.state) as temporary:
            torch.save(kept | {"average": self.average, "step": self.step, "seconds": seconds}, temporary)
