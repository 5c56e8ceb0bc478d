"""Test-only ComfyUI nodes: conditioning for models without a text encoder, a small random text encoder, and
the small model's decoder."""

import sys
from types import SimpleNamespace
from unittest import mock

import comfy.model_detection as detection
import torch
from comfy_api.latest import ComfyExtension, io

from comfyui_nibble.quant_core.evaluation.demo import pictures
from comfyui_nibble.tests.host.narrow import widths_from_weights

from . import codes, heap, landscape, memory, options, shield

ROUTES = [heap.heap]


class TestCaptions(io.ComfyNode):
    """Captions of the small model, one a line -> one conditioning entry each."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TestCaptions",
            category="test",
            inputs=[io.String.Input("captions", multiline=True)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, captions):
        return io.NodeOutput([entry for line in captions.splitlines() for entry in encoded(line)])


def encoded(caption):
    """The conditioning of one caption of the small model."""
    context, pooled = pictures.encode_caption(caption)
    return [[context[None], {"pooled_output": pooled[None], "guidance": 3.5}]]


class TestCaptionEncoder(io.ComfyNode):
    """The small model's text encoder, as far as nodes ask for one: words have fixed vectors."""

    @classmethod
    def define_schema(cls):
        return io.Schema("TestCaptionEncoder", category="test", inputs=[], outputs=[io.Clip.Output()])

    @classmethod
    def execute(cls):
        return io.NodeOutput(
            SimpleNamespace(tokenize=lambda text: text, encode_from_tokens_scheduled=encoded)
        )


class TestConditioning(io.ComfyNode):
    """Seeded random conditioning of any width, `entries` of them. image_tokens: of CLIP's vision model, as
    Wan's image to video takes. mask: 1 to go with the attention mask that T5 gives."""

    @classmethod
    def define_schema(cls):
        inputs = [
            io.Int.Input(n, default=d, max=2**31)
            for n, d in (("tokens", 16), ("dim", 4096), ("pooled_dim", 768), ("seed", 0), ("entries", 1))
        ]
        inputs += [io.Int.Input(n, default=0, optional=True) for n in ("image_tokens", "mask")]
        return io.Schema(
            "TestConditioning", category="test", inputs=inputs, outputs=[io.Conditioning.Output()]
        )

    @classmethod
    def execute(cls, tokens, dim, pooled_dim, seed, entries, image_tokens=0, mask=0):
        g = torch.Generator().manual_seed(seed)
        out = []
        for _ in range(entries):
            extra = {"guidance": 3.5}
            if pooled_dim:
                extra["pooled_output"] = torch.randn(1, pooled_dim, generator=g)
            if mask:
                extra["attention_mask"] = torch.ones(1, tokens)
            if image_tokens:
                seen = torch.randn(1, image_tokens, 1280, generator=g)
                extra["clip_vision_output"] = SimpleNamespace(penultimate_hidden_states=seen)
            out.append([torch.randn(1, tokens, dim, generator=g), extra])
        return io.NodeOutput(out)


class TestDecode(io.ComfyNode):
    """The small model's latents as pictures."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TestDecode", category="test", inputs=[io.Latent.Input("samples")], outputs=[io.Image.Output()]
        )

    @classmethod
    def execute(cls, samples):
        import comfy.latent_formats

        return io.NodeOutput(pictures.decode(comfy.latent_formats.Flux().process_in(samples["samples"])))


class TestTextEncoder(io.ComfyNode):
    """The real tokenizers in front of seeded random encoders of few layers, instead of the loaders of 10 GB
    files."""

    @classmethod
    def define_schema(cls):
        inputs = [
            io.Combo.Input("type", options=["flux", "pixart", "wan", "sdxl"]),
            io.Int.Input("seed", default=0, max=2**31),
        ]
        return io.Schema("TestTextEncoder", category="test", inputs=inputs, outputs=[io.Clip.Output()])

    @classmethod
    def execute(cls, type, seed):
        import comfy.sd
        import comfy.sdxl_clip
        from comfy.text_encoders import flux, pixart_t5

        encoder, tokenizer = {
            "flux": lambda: (flux.flux_clip(), flux.FluxTokenizer),
            "pixart": lambda: (pixart_t5.pixart_te(), pixart_t5.PixArtTokenizer),
            # UMT5, of the same width, whose vocabulary comes with its weights only.
            "wan": lambda: (pixart_t5.pixart_te(), pixart_t5.PixArtTokenizer),
            "sdxl": lambda: (comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer),
        }[type]()
        # The widths of the outputs and the vocabularies stay: models and tokenizers depend on them.
        options = {
            "clip_l_model_config": {"num_hidden_layers": 3 if type == "sdxl" else 2, "intermediate_size": 64},
            "clip_g_model_config": {"num_hidden_layers": 3, "intermediate_size": 64},
            "t5xxl_model_config": {"num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 64},
        }
        clip = comfy.sd.CLIP(
            SimpleNamespace(params={}, clip=encoder, tokenizer=tokenizer), model_options=options
        )
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in clip.cond_stage_model.named_parameters():
                if "norm" in name and name.endswith("weight"):
                    weight.fill_(1.0)
                elif weight.ndim:  # all but CLIP's temperature
                    weight.copy_(torch.randn(weight.shape, generator=g) / weight.shape[-1] ** 0.5)
        return io.NodeOutput(clip)


class TestRebuild(io.ComfyNode):
    """The model as ComfyUI makes it afresh: by its `cached_patcher_init`, as for multi-GPU."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TestRebuild", category="test", inputs=[io.Model.Input("model")], outputs=[io.Model.Output()]
        )

    @classmethod
    def execute(cls, model):
        make, args = model.cached_patcher_init
        again = make(*args, disable_dynamic=True)
        assert again.model is not model.model
        return io.NodeOutput(again)


class TestLoadOnHopper(io.ComfyNode):
    """Nibble Load Diffusion Model as on an H100: everything but where it computes."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TestLoadOnHopper",
            category="test",
            inputs=[io.String.Input("model_name")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model_name):
        import nodes

        loader = nodes.NODE_CLASS_MAPPINGS["NibbleLoadDiffusionModel"]
        build = sys.modules[loader.__module__.rpartition(".")[0] + ".host.build"]
        hopper = build.target_of("cpu").__class__("cuda", 90, (3, 6), "an H100")
        with mock.patch.object(build, "target_of", return_value=hopper):
            return loader.execute(model_name)


class TestAfter(io.ComfyNode):
    """The model as it is, once the latents have been sampled."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Model.Input("model"), io.Latent.Input("samples")]
        return io.Schema("TestAfter", category="test", inputs=inputs, outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, model, samples):
        return io.NodeOutput(model)


class TestSharedTensors(io.ComfyNode):
    """The names of `model`'s tensors that lie in the same memory as the tensor of that name in `source`, one
    a line."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Model.Input("model"), io.Model.Input("source")]
        return io.Schema("TestSharedTensors", category="test", inputs=inputs, outputs=[io.String.Output()])

    @classmethod
    def execute(cls, model, source):
        ours, theirs = (m.model.diffusion_model.state_dict() for m in (model, source))
        return io.NodeOutput(
            "\n".join(k for k, t in ours.items() if k in theirs and t.data_ptr() == theirs[k].data_ptr())
        )


detection.detect_unet_config = widths_from_weights(detection.detect_unet_config)


class TestExtension(ComfyExtension):
    async def get_node_list(self):
        ours = [
            TestCaptions,
            TestCaptionEncoder,
            TestRebuild,
            TestConditioning,
            TestDecode,
            TestTextEncoder,
            TestLoadOnHopper,
            TestAfter,
            TestSharedTensors,
        ]
        return [*ours, *landscape.NODES, *shield.NODES, *memory.NODES, *options.NODES, *codes.NODES]


async def comfy_entrypoint():
    return TestExtension()
