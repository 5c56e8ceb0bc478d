"""Test-only nodes around the model of landscapes: captions, pictures, and what goes into CLIP and VAE
sockets."""

import comfy.latent_formats
from comfy_api.latest import io

from comfyui_nibble.quant_core.evaluation.demo import landscapes


class LandscapeText:
    """What nodes call of a CLIP, on a landscape's caption."""

    def clone(self, *args, **kwargs):
        return self

    def tokenize(self, text, **kwargs):
        return text

    def encode_from_tokens(self, tokens, return_pooled=False, return_dict=False, **kwargs):
        context, pooled = (t[None] for t in landscapes.encode_caption(tokens))
        if return_dict:
            return {"cond": context, "pooled_output": pooled}
        return (context, pooled) if return_pooled else context

    def encode_from_tokens_scheduled(self, tokens, **kwargs):
        context, pooled = self.encode_from_tokens(tokens, return_pooled=True)
        return [[context, {"pooled_output": pooled, "guidance": 3.5}]]


class LandscapePictures:
    """What nodes call of a VAE, by formula: a latent pixel is 4 x 4 pixels of a picture."""

    def spacial_compression_decode(self):
        return landscapes.PATCH

    spacial_compression_encode = spacial_compression_decode

    def temporal_compression_decode(self):
        return None

    def throw_exception_if_invalid(self):
        pass

    def decode(self, samples, **kwargs):
        return landscapes.decode(comfy.latent_formats.Flux().process_in(samples))

    decode_tiled = decode

    def encode(self, pixels):
        return comfy.latent_formats.Flux().process_out(landscapes.encode(pixels[..., :3].float()))

    encode_tiled = encode


class TestLandscapeCaptions(io.ComfyNode):
    """Captions of landscapes, one a line -> one conditioning entry each."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TestLandscapeCaptions",
            category="test",
            inputs=[io.String.Input("captions", multiline=True)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, captions):
        text = LandscapeText()
        lines = captions.splitlines()
        return io.NodeOutput([entry for line in lines for entry in text.encode_from_tokens_scheduled(line)])


class TestLandscapeDecode(io.ComfyNode):
    """The landscape model's latents as pictures."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TestLandscapeDecode",
            category="test",
            inputs=[io.Latent.Input("samples")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples):
        return io.NodeOutput(LandscapePictures().decode(samples["samples"]))


class TestLandscapeTextEncoder(io.ComfyNode):
    """The landscape model's captions for a CLIP socket."""

    @classmethod
    def define_schema(cls):
        return io.Schema("TestLandscapeTextEncoder", category="test", inputs=[], outputs=[io.Clip.Output()])

    @classmethod
    def execute(cls):
        return io.NodeOutput(LandscapeText())


class TestLandscapeVAE(io.ComfyNode):
    """The landscape model's pictures for a VAE socket."""

    @classmethod
    def define_schema(cls):
        return io.Schema("TestLandscapeVAE", category="test", inputs=[], outputs=[io.Vae.Output()])

    @classmethod
    def execute(cls):
        return io.NodeOutput(LandscapePictures())


NODES = [TestLandscapeCaptions, TestLandscapeDecode, TestLandscapeTextEncoder, TestLandscapeVAE]
