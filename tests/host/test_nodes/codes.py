"""Sampling on the activation codes of another sampling: `tests.codes` around each call of the network, in the
pack that ComfyUI loaded."""

import json
import sys
from contextlib import contextmanager

import torch
from comfy_api.latest import io

import nodes
from comfyui_nibble.tests import codes

KEPT: dict[str, list[codes.Codes]] = {}  # name: one for each call of the network, from prompt to prompt
TAKEN: dict[str, list[codes.Taken]] = {}


def quantizer():
    pack = nodes.NODE_CLASS_MAPPINGS["NibbleLoadDiffusionModel"].__module__.rpartition(".nodes")[0]
    return sys.modules[f"{pack}.kernels.operator.quantizers"]


def wrapped(model, running):
    """A clone whose network is called within running(args), around the wrapper that it may have."""
    out, context = model.clone(), contextmanager(running)
    inner = out.model_options.get(
        "model_function_wrapper", lambda apply, args: apply(args["input"], args["timestep"], **args["c"])
    )

    def wrap(apply, args):
        with context(args):
            return inner(apply, args)

    out.set_model_unet_function_wrapper(wrap)
    return out


class TestKeepCodes(io.ComfyNode):
    """The model, whose codes are kept under a name."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TestKeepCodes",
            category="test",
            inputs=[io.Model.Input("model"), io.String.Input("name")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, name):
        kept = KEPT[name] = []

        def running(args):
            with codes.kept(quantizer()) as now:
                kept.append(now)
                yield

        return io.NodeOutput(wrapped(model, running))


class TestTakeCodes(io.ComfyNode):
    """The model, which takes the codes kept under other names: `positive`, one name for each image of the
    batch, and `negative` likewise, from the network's call `start` on; a second sampling begins there again.
    What it took is told under its own name."""

    @classmethod
    def define_schema(cls):
        inputs = [
            io.Model.Input("model"),
            io.String.Input("name"),
            io.String.Input("positive"),
            io.String.Input("negative"),
        ]
        inputs += [io.Int.Input("start")]
        return io.Schema("TestTakeCodes", category="test", inputs=inputs, outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, model, name, positive, negative, start):
        sources = [[KEPT[n] for n in names.split()] for names in (positive, negative)]
        done, took = [0, 0], TAKEN.setdefault(name, [])
        took.clear()

        def running(args):
            images = []
            for branch in args["cond_or_uncond"]:
                images += [
                    calls[start + done[branch] % (len(calls) - start)].calls for calls in sources[branch]
                ]
                done[branch] += 1
            together = codes.Codes(torch.cat(call) for call in zip(*images, strict=True))
            with codes.taken(together, quantizer()) as now:
                took.append(now)
                yield

        return io.NodeOutput(wrapped(model, running))


class TestCodesTaken(io.ComfyNode):
    """What a model took, once the latents are sampled, as JSON: the largest `edge`, the codes `changed`, all
    the codes."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Latent.Input("samples"), io.String.Input("name")]
        return io.Schema("TestCodesTaken", category="test", inputs=inputs, outputs=[io.String.Output()])

    @classmethod
    def execute(cls, samples, name):
        took = TAKEN[name]
        assert all(t.at == len(t.codes.calls) for t in took)
        said = {
            "edge": max(t.edge for t in took),
            "changed": sum(t.changed for t in took),
            "codes": sum(len(t.codes) for t in took),
        }
        return io.NodeOutput(json.dumps(said))


NODES = [TestKeepCodes, TestTakeCodes, TestCodesTaken]
