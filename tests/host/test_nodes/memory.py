"""Sampling as on a card too small for the model. On a CPU ComfyUI loads every model in full; here only the
answers on which it decides are another card's, the loading, offloading and sampling are its own."""

import hashlib
import json
from contextlib import contextmanager
from unittest import mock

import comfy.model_management as mm
from comfy_api.latest import io

import nodes

STATES = {
    "normal": mm.VRAMState.NORMAL_VRAM,
    "lowvram": mm.VRAMState.LOW_VRAM,
    "novram": mm.VRAMState.NO_VRAM,
}


@contextmanager
def small_card(model, budget, state="normal"):
    """A card with `budget` bytes for this model's weights."""
    free = lambda: mm.minimum_inference_memory() + budget - model.loaded_size()
    answers = {
        "is_device_cpu": lambda device: False,
        "vram_state": STATES[state],
        "get_free_memory": lambda device=None, torch_free_too=False: (
            (free(), 0) if torch_free_too else free()
        ),
    }
    with mock.patch.multiple(mm, **answers):
        yield


def digest(model):
    """Of the codes of all packed layers."""
    out = hashlib.sha256()
    for _, layer in model.packed_layers():
        out.update(layer.weight.detach().cpu().numpy().tobytes())
    return out.hexdigest()


class TestSmallCard(io.ComfyNode):
    """The stock sampler where `share` of the model's bytes fit. after_unload: it is sampled once in full
    first, then ComfyUI asks for that share of the memory back, then it is sampled again."""

    @classmethod
    def define_schema(cls):
        inputs = [
            io.Model.Input("model"),
            io.Conditioning.Input("positive"),
            io.Conditioning.Input("negative"),
            io.Latent.Input("latent_image"),
        ]
        inputs += [
            io.Int.Input("seed", max=2**31),
            io.Int.Input("steps"),
            io.Combo.Input("state", options=list(STATES)),
        ]
        inputs += [io.Float.Input("share"), io.Float.Input("after_unload", default=0.0)]
        return io.Schema(
            "TestSmallCard", category="test", inputs=inputs, outputs=[io.Latent.Output(), io.String.Output()]
        )

    @classmethod
    def execute(cls, model, positive, negative, latent_image, seed, steps, state, share, after_unload):
        before = digest(model)
        load_models_gpu, budget = mm.load_models_gpu, share * model.model_size()

        def load(*args, **kwargs):
            with small_card(model, budget, state):
                load_models_gpu(*args, **kwargs)

        def sample():
            return nodes.common_ksampler(
                model, seed, steps, 1.0, "euler", "simple", positive, negative, latent_image
            )[0]

        with mock.patch.object(mm, "load_models_gpu", load):
            out = sample()
            if after_unload:
                assert not model.model.model_lowvram
                with small_card(model, budget, state):
                    mm.free_memory(
                        mm.get_free_memory() + after_unload * model.loaded_size(), model.load_device
                    )
                budget = model.loaded_size()
                assert model.model.model_lowvram
                assert budget > 0
                out = sample()
        seen = {
            "partial": model.model.model_lowvram,
            "loaded": model.loaded_size() / model.model_size(),
            "packed bytes unchanged": digest(model) == before,
        }
        model.detach()
        seen["adapters left"] = sum(bool(layer.attached.key) for _, layer in model.packed_layers())
        return io.NodeOutput(out, json.dumps(seen))


NODES = [TestSmallCard]
