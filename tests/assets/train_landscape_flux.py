"""Trains the small FLUX of `nibble demo`: `python -m comfyui_nibble.tests.assets.train_landscape_flux`.

Flow matching on the landscapes of `quant_core/evaluation/demo/landscapes.py`; the result is the moving
average of the weights in bfloat16, in ComfyUI's key names. The learning rate follows the clock, so that a
busy machine is done in time too. A stopped run goes on from its state beside the result.

The shipped file took 5,258 steps in 44 minutes on one core, stopped twice and resumed with other lengths of
the stages, so that this script makes a model like it and not its bytes.
"""

import time
from itertools import product
from pathlib import Path

import torch
import typer

from comfyui_nibble.quant_core.evaluation.demo import landscapes
from comfyui_nibble.quant_core.evaluation.demo.landscape_flux import MODEL
from comfyui_nibble.quant_core.evaluation.demo.model import HEAD_DIM, HIDDEN, image_ids, to_tokens
from comfyui_nibble.tests.assets.flow_training import Stage, Training, start_at_identity

SIDE = landscapes.SIZE // (2 * landscapes.PATCH)  # of a picture, in tokens
SKY = 6 * SIDE  # tokens that the clouds reach, and neither the ground nor a pine


STAGES = (Stage(0.6, 64, 16, 0.998), Stage(0.7, 128, 16, 0.998), Stage(1.0, SIDE**2, 8, 0.99))


def pool(drifts: int = 6, seed: int = 0):
    """(tokens (N, 256, 64) of every scene that a caption can name, their skies (N / 16, drifts, 96, 64), the
    captions). 16 scenes have one sky; each is drawn with clouds at so many places."""
    words = (landscapes.TERRAINS, landscapes.TIMES, landscapes.PLACES)
    below = list(product(landscapes.GROUNDS, landscapes.PINES, landscapes.CABINS))
    jitter = 0.15 * torch.randn(drifts, generator=torch.Generator().manual_seed(seed))
    places = (torch.linspace(-1, 1, drifts) + jitter).clamp(-1, 1)
    tokens, skies, captions = [], [], []

    def drawn(scene):
        return to_tokens(landscapes.encode(torch.from_numpy(landscapes.draw(scene))[None]))[0]

    for sky in product(*words):
        scenes = [landscapes.Scene(*sky, *rest) for rest in below]
        tokens += map(drawn, scenes)
        captions += [scene.caption for scene in scenes]
        cloudy = [landscapes.Scene(*sky, *below[0], float(d)) for d in places]
        skies.append(torch.stack([drawn(scene)[:SKY] for scene in cloudy]))
    return torch.stack(tokens), torch.stack(skies), captions


@torch.no_grad()
def start_with_places(model, contexts: torch.Tensor) -> None:
    """Image tokens find out where they lie from the first step on, which takes thousands otherwise.

    FLUX gives a token its place by a rotation of queries and keys alone. Here the first block starts with
    one query for all image tokens, and with keys that answer best where slot s of the text, turned by s
    places, meets it: in the first head along a row, in the second along a column. contexts: (N, 16, 128), all
    words in all their slots.
    """
    block = model.transformer_blocks[0]
    pairs = torch.arange(28)
    frequencies = 10000.0 ** (-pairs / 28)
    strength = torch.where(pairs < 9, 1.0, 0.15)  # the others hardly turn within a picture
    phase = 2 * torch.pi * torch.rand(28, generator=torch.Generator().manual_seed(0))
    slots = torch.arange(landscapes.TEXT_TOKENS)
    angles = phase + slots[:, None] * frequencies
    turned = torch.stack([strength * angles.cos(), strength * angles.sin()], -1).flatten(1)
    keys = torch.zeros(len(slots), HIDDEN // HEAD_DIM, HEAD_DIM)
    keys[:, 0, 72:], keys[:, 1, 16:72] = turned, turned  # FLUX's axes: 16, 56 (down), 56 (right)
    keys *= (HEAD_DIM / keys.square().sum(-1, keepdim=True)).sqrt()
    block.attn.to_q.weight *= 0.1
    block.attn.to_q.bias.copy_(keys[0].flatten())
    numbered = torch.cat([contexts, slots[None, :, None].expand(len(contexts), -1, 1)], -1)
    rows = numbered.flatten(0, 1).unique(dim=0)
    words = torch.nn.functional.layer_norm(model.context_embedder(rows[:, :-1]), (HIDDEN,), eps=1e-6)
    answer = torch.linalg.lstsq(words, keys[rows[:, -1].long()].flatten(1), driver="gelsd").solution
    block.attn.add_k_proj.weight.copy_(answer.T)
    block.attn.add_k_proj.bias.zero_()
    block.norm1.linear.bias[2 * HIDDEN : 3 * HIDDEN] = 1  # the gate of the attention is open
    block.attn.to_out[0].weight *= 2


def loss_of(model, clean, context, pooled, seen):
    """Flow matching's loss on the tokens `seen`."""
    noise = torch.randn_like(clean)
    t = torch.sigmoid(1.2 * torch.randn(len(clean)) + 0.2)
    at = t.view(-1, 1, 1)
    velocity = model(
        hidden_states=(1 - at) * clean + at * noise,
        encoder_hidden_states=context,
        pooled_projections=pooled,
        timestep=t,
        img_ids=image_ids(SIDE)[seen],
        txt_ids=torch.zeros(context.shape[1], 3),
        return_dict=False,
    )[0]
    return (velocity - (noise - clean)).square().mean()


def main(
    out: Path = MODEL.checkpoint,
    minutes: float = 45,
    seed: int = 0,
    peak_rate: float = 2.2e-3,
):
    torch.manual_seed(seed)
    tokens, skies, captions = pool()
    contexts, pooled = MODEL.encode_captions([*captions, ""])
    model = MODEL.build()
    start_at_identity(model)
    start_with_places(model, contexts)
    training = Training(out, MODEL, model, peak_rate)
    meta = {"minutes": minutes, "seed": seed, "peak_rate": peak_rate}
    torch.manual_seed(seed + training.step)
    started = kept = time.time()
    while (seconds := training.seconds + time.time() - started) < 60 * minutes:
        done = seconds / (60 * minutes)
        stage = next(stage for stage in STAGES if done < stage.until)
        scene = torch.randint(len(tokens), (stage.pictures,))
        clean = tokens[scene]
        sky = skies[scene // (len(tokens) // len(skies))]
        clean[:, :SKY] = sky[torch.arange(stage.pictures), torch.randint(sky.shape[1], (stage.pictures,))]
        # One caption in twenty is empty, so that classifier-free guidance has something to work with.
        caption = torch.where(torch.rand(stage.pictures) < 0.05, len(captions), scene)
        seen = torch.randperm(SIDE**2)[: stage.tokens]
        loss = loss_of(training.model, clean[:, seen], contexts[caption], pooled[caption], seen)
        training.take(loss, done, stage.decay)
        if training.step % 50 == 0:
            print(f"{seconds:.0f} s, step {training.step}: loss {training.loss:.4f}", flush=True)
        if time.time() - kept > 120:
            training.keep(seconds, meta)
            kept = time.time()
    training.keep(seconds, meta)
    training.state.unlink()


if __name__ == "__main__":
    typer.run(main)
