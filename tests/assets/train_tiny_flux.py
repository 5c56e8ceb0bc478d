"""Trains the small FLUX of the tests and of `nibble demo`, from a seed: `python
tests/assets/train_tiny_flux.py`.

Flow matching on the procedural pictures of `quant_core/evaluation/demo/pictures.py`; the result is the moving
average of the weights in bfloat16, in ComfyUI's key names. About 35 minutes on two CPU cores.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
import typer
from tqdm import trange

from comfyui_nibble.quant_core.evaluation.demo import pictures, tiny_flux
from comfyui_nibble.tests.assets.flow_training import follow, save, start_at_identity


def batch(rng, size):
    scenes = [pictures.random_scene(rng) for _ in range(size)]
    images = torch.from_numpy(np.stack([pictures.draw(s) for s in scenes])).float()
    # One caption in ten is empty, so that classifier-free guidance has something to work with.
    captions = ["" if rng.random() < 0.1 else s.caption for s in scenes]
    return pictures.encode(images), *tiny_flux.encode_captions(captions)


def main(
    out: Path = tiny_flux.CHECKPOINT,
    steps: int = 6000,
    batch_size: int = 32,
    seed: int = 0,
    peak_rate: float = 1.2e-3,
):
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = tiny_flux.build()
    start_at_identity(model)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_rate, steps, pct_start=0.05, anneal_strategy="cos"
    )
    running, started = None, time.time()
    for step in (bar := trange(steps, file=sys.stderr, mininterval=5)):
        clean, context, pooled = batch(rng, batch_size)
        noise = torch.randn_like(clean)
        t = torch.sigmoid(torch.randn(batch_size))
        noisy = (1 - t.view(-1, 1, 1, 1)) * clean + t.view(-1, 1, 1, 1) * noise
        loss = (tiny_flux.predict(model, noisy, t, context, pooled) - (noise - clean)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        follow(average, model, step)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
        if step % 500 == 499 or step == steps - 1:
            meta = {
                "steps": step + 1,
                "of": steps,
                "seed": seed,
                "batch_size": batch_size,
                "loss": round(running, 5),
            }
            save(out, tiny_flux.MODEL, average, meta)
    print(f"{out}: loss {running:.4f}, {(time.time() - started) / 60:.1f} min")


if __name__ == "__main__":
    typer.run(main)
