"""What node packs hang on a model besides LoRA: block replacements, attention patches and overrides, wrappers
of the whole network."""

import torch
from comfy_api.latest import io


def block(kind, number, gain=None):
    """A replacement of a whole block: as it was, or with its change of the image scaled."""

    def replace(args, extra):
        before = args["img"].clone()
        out = extra["original_block"](args)
        if gain is not None:
            out["img"] = before + gain * (out["img"] - before)
        return out

    return lambda m: m.set_model_patch_replace(replace, "dit", kind, number)


def attention_patch(gain=None):
    def patch(q, k, v, pe=None, attn_mask=None, extra_options=None):
        return {"q": q if gain is None else q * gain, "k": k, "v": v, "pe": pe, "attn_mask": attn_mask}

    return lambda m: m.set_model_attn1_patch(patch)


def attention_output(gain=None):
    return lambda m: m.set_model_attn1_output_patch(lambda out, extra: out if gain is None else out * gain)


def attention_override(gain=None):
    """Another attention: torch's own on reshaped heads."""

    def attention(q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
        if not skip_reshape:
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        scale = q.shape[-1] ** -0.5
        out = torch.softmax(q @ k.transpose(-1, -2) * (scale if gain is None else scale * gain), -1) @ v
        return out.transpose(1, 2).flatten(2)

    return lambda m: m.set_model_optimized_attention(attention)


def wrapper(gain=None):
    def wrap(apply, args):
        out = apply(args["input"], args["timestep"], **args["c"])
        return out if gain is None else out * gain

    return lambda m: m.set_model_unet_function_wrapper(wrap)


# kind: a function of `gain` (None: the patch changes nothing) that makes a function of the model.
PATCHES = {
    "double block": lambda gain: block("double_block", 0, gain),
    "single block": lambda gain: block("single_block", 1, gain),
    "attn1_patch": attention_patch,
    "attn1_output_patch": attention_output,
    "attention override": attention_override,
    "function wrapper": wrapper,
}


class TestModelPatch(io.ComfyNode):
    """A clone of the model with one patch; gain 0: one that changes nothing."""

    @classmethod
    def define_schema(cls):
        inputs = [
            io.Model.Input("model"),
            io.Combo.Input("patch", options=list(PATCHES)),
            io.Float.Input("gain"),
        ]
        return io.Schema("TestModelPatch", category="test", inputs=inputs, outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, model, patch, gain):
        out = model.clone()
        PATCHES[patch](gain or None)(out)
        return io.NodeOutput(out)


class TestNoise(io.ComfyNode):
    """A seeded random picture or latent of a batch of one."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Int.Input("size"), io.Int.Input("seed")]
        return io.Schema("TestNoise", category="test", inputs=inputs, outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, size, seed):
        return io.NodeOutput(torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(seed)))


NODES = [TestModelPatch, TestNoise]
