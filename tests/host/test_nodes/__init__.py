"""Test-only ComfyUI nodes: conditioning for models without a text encoder, and the small model's decoder."""

import torch
from comfy_api.latest import ComfyExtension, io

from comfyui_nibble.quant_core.demo import pictures


class TestCaptions(io.ComfyNode):
    """Captions of the small model, one a line -> one conditioning entry each."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TestCaptions", category="test", inputs=[io.String.Input("captions", multiline=True)], outputs=[io.Conditioning.Output()]
        )

    @classmethod
    def execute(cls, captions):
        out = []
        for line in captions.splitlines():
            context, pooled = pictures.encode_caption(line)
            out.append([context[None], {"pooled_output": pooled[None], "guidance": 3.5}])
        return io.NodeOutput(out)


class TestConditioning(io.ComfyNode):
    """Seeded random conditioning of any width, `entries` of them."""

    @classmethod
    def define_schema(cls):
        inputs = [
            io.Int.Input(n, default=d, max=2**31)
            for n, d in (("tokens", 16), ("dim", 4096), ("pooled_dim", 768), ("seed", 0), ("entries", 1))
        ]
        return io.Schema("TestConditioning", category="test", inputs=inputs, outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, tokens, dim, pooled_dim, seed, entries):
        g = torch.Generator().manual_seed(seed)
        out = []
        for _ in range(entries):
            extra = {"guidance": 3.5}
            if pooled_dim:
                extra["pooled_output"] = torch.randn(1, pooled_dim, generator=g)
            out.append([torch.randn(1, tokens, dim, generator=g), extra])
        return io.NodeOutput(out)


class TestDecode(io.ComfyNode):
    """The small model's latents as pictures."""

    @classmethod
    def define_schema(cls):
        return io.Schema("TestDecode", category="test", inputs=[io.Latent.Input("samples")], outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, samples):
        import comfy.latent_formats

        return io.NodeOutput(pictures.decode(comfy.latent_formats.Flux().process_in(samples["samples"])))


class TestExtension(ComfyExtension):
    async def get_node_list(self):
        return [TestCaptions, TestConditioning, TestDecode]


async def comfy_entrypoint():
    return TestExtension()
