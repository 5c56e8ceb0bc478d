"""Trains the small PixArt: `python -m comfyui_nibble.tests.assets.train_shield_pixart`.

Prediction of the noise in the coats of arms of `quant_core/evaluation/demo/shields.py`; the result is the
moving average of the weights in bfloat16, in ComfyUI's key names. The learning rate follows the clock, so
that a busy machine is done in time too. A stopped run goes on from its state beside the result.

The shipped file took 3,610 steps in 38 minutes on a part of one busy core, and its pictures were drawn
beforehand by two processes, 5,000 by each, so that this script makes a model like it and not its bytes.
"""

import time
from pathlib import Path

import numpy as np
import torch
import typer

from comfyui_nibble.quant_core.evaluation.demo import shields
from comfyui_nibble.quant_core.evaluation.demo.pixart_model import CHANNELS, TIMESTEPS, sigma_at
from comfyui_nibble.quant_core.evaluation.demo.shield_pixart import MODEL
from comfyui_nibble.tests.assets.flow_training import Stage, Training

TOKENS = (shields.SIZE // shields.TOKEN) ** 2  # of a picture


STAGES = (Stage(0.55, 64, 16, 0.998), Stage(0.7, 128, 8, 0.998), Stage(1.0, TOKENS, 4, 0.995))


def pool(count: int, seed: int):
    """(latents (N, 4, 34, 34) in float16, their captions), none of them held out."""
    rng = np.random.default_rng(seed)
    scenes = [shields.scene_of(rng, held=False) for _ in range(count)]
    pictures = (torch.from_numpy(shields.draw(scene))[None] for scene in scenes)
    return torch.cat([shields.encode(p).half() for p in pictures]), [scene.caption for scene in scenes]


@torch.no_grad()
def start(model) -> None:
    """The model begins by taking all that it sees for noise, which at most timesteps is nearly right, and
    the blocks have but to find the rest: they begin as the identity with their gates open.

    Tokens are embedded in directions that the places' embedding leaves free, and the last layer reads them
    there.
    """
    places = model.pos_embed.pos_embed[0]
    width = places.shape[1]
    _, _, directions = torch.linalg.svd(torch.cat([places, 100 * torch.ones(1, width)]))
    free = directions[-width // 4 :].T
    mixed = torch.linalg.qr(torch.randn(free.shape[1], 4 * CHANNELS)).Q
    embedding = 1.25 * free @ mixed  # (width, 16)
    proj = model.pos_embed.proj
    proj.weight.copy_(embedding.view_as(proj.weight))
    proj.bias.zero_()
    noise = torch.randn(16 * len(places), 4 * CHANNELS) @ embedding.T
    std = (noise.view(16, *places.shape) + places).var(-1).mean().sqrt()
    out = torch.zeros(4, 2 * CHANNELS, width)  # by latent pixel of the token, then by channel
    out[:, :CHANNELS] = (std / 1.25**2 * embedding).view(width, CHANNELS, 4).permute(2, 1, 0)
    model.proj_out.weight.copy_(out.flatten(0, 1))
    model.proj_out.bias.zero_()
    for module in (
        model.adaln_single.linear,
        *(
            last
            for block in model.transformer_blocks
            for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2])
        ),
    ):
        module.weight.zero_()
        module.bias.zero_()
    model.scale_shift_table.zero_()
    # What the last layer adds to each token of the time embedding begins at zero too.
    model.adaln_single.emb.timestep_embedder.linear_2.weight.mul_(0.1)
    model.adaln_single.emb.timestep_embedder.linear_2.bias.zero_()
    for block in model.transformer_blocks:
        block.scale_shift_table.zero_()
        block.scale_shift_table[[2, 5]] = 1


def tokens_of(latents):
    """(B, 4, h, w) -> (B, hw/4, 16), in the order of the model's last layer."""
    return (
        torch.nn.functional.pixel_unshuffle(latents, 2)
        .unflatten(1, (CHANNELS, 4))
        .permute(0, 3, 4, 2, 1)
        .flatten(1, 2)
        .flatten(2)
    )


def noise_of(model, noisy, timestep, context, seen):
    """What the model takes for noise in the tokens `seen` -> (B, tokens, 16)."""
    x = model.pos_embed(noisy)[:, seen]
    modulation, embedded = model.adaln_single(timestep, None, batch_size=len(x), hidden_dtype=x.dtype)
    text = model.caption_projection(context)
    for block in model.transformer_blocks:
        x = block(x, encoder_hidden_states=text, timestep=modulation)
    shift, scale = (model.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
    out = model.proj_out(model.norm_out(x) * (1 + scale) + shift)
    return out.unflatten(2, (4, 2 * CHANNELS))[..., :CHANNELS].flatten(2)


def loss_of(model, clean, context, seen):
    """The mean squared error of the noise in the tokens `seen`, which counts for more where there is more
    of it: by 1 + sigma^2, up to 64. That is the error of the velocity, which has the same weight at all
    timesteps."""
    noise = torch.randn_like(clean)
    timestep = (torch.randperm(len(clean)) + torch.rand(len(clean))) / len(clean) * (TIMESTEPS - 1)
    sigma = sigma_at(timestep)
    kept = (1 + sigma**2).rsqrt().view(-1, 1, 1, 1)
    noisy = kept * (clean + sigma.view(-1, 1, 1, 1) * noise)
    error = noise_of(model, noisy, timestep, context, seen) - tokens_of(noise)[:, seen]
    weight = 1 / (1 / (1 + sigma**2) + 1 / 64)
    return (weight.view(-1, 1, 1) * error.square()).mean()


def main(
    out: Path = MODEL.checkpoint,
    minutes: float = 38,
    pictures: int = 10000,
    seed: int = 0,
    peak_rate: float = 1.5e-3,
):
    torch.manual_seed(seed)
    drawn = out.with_name(f"{out.name}.pool")
    if not drawn.exists():
        torch.save(pool(pictures, seed), drawn)
    latents, captions = torch.load(drawn, weights_only=True)
    contexts = MODEL.encode_captions([*captions, ""])
    model = MODEL.build()
    start(model)
    training = Training(out, MODEL, model, peak_rate)
    meta = {"minutes": minutes, "seed": seed, "peak_rate": peak_rate}
    torch.manual_seed(seed + training.step)
    started = kept = time.time()
    while (seconds := training.seconds + time.time() - started) < 60 * minutes:
        done = seconds / (60 * minutes)
        stage = next(stage for stage in STAGES if done < stage.until)
        scene = torch.randint(len(latents), (stage.pictures,))
        # One caption in twenty is empty, so that classifier-free guidance has something to work with.
        caption = torch.where(torch.rand(stage.pictures) < 0.05, len(captions), scene)
        seen = torch.randperm(TOKENS)[: stage.tokens]
        loss = loss_of(training.model, latents[scene].float(), contexts[caption], seen)
        training.take(loss, done, stage.decay)
        if training.step % 50 == 0:
            print(f"{seconds:.0f} s, step {training.step}: loss {training.loss:.4f}", flush=True)
        if time.time() - kept > 120:
            training.keep(seconds, meta)
            kept = time.time()
    training.keep(seconds, meta)
    training.state.unlink()
    drawn.unlink()


if __name__ == "__main__":
    typer.run(main)
