"""Test-only nodes around the model of coats of arms: captions and pictures."""

import comfy.latent_formats
from comfy_api.latest import io

from comfyui_nibble.quant_core.evaluation.demo import shields


class TestShieldCaptions(io.ComfyNode):
    """Captions of coats of arms, one a line -> one conditioning entry each."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TestShieldCaptions",
            category="test",
            inputs=[io.String.Input("captions", multiline=True)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, captions):
        return io.NodeOutput([[shields.encode_caption(line)[None], {}] for line in captions.splitlines()])


class TestShieldDecode(io.ComfyNode):
    """The latents of the model of coats of arms as pictures."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TestShieldDecode",
            category="test",
            inputs=[io.Latent.Input("samples")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples):
        return io.NodeOutput(shields.decode(comfy.latent_formats.SDXL().process_in(samples["samples"])))


NODES = [TestShieldCaptions, TestShieldDecode]
