"""SDXL, its refiner and its smaller relatives (SSD-1B, Vega, KOALA): a U-Net; the linear layers of its
transformers are quantized.

Source: Stability's reference model. Each transformer has a projection in and out around blocks of
self-attention, cross-attention to the text and a GEGLU MLP: `ff.net.2` reads a product, no GELU.
Convolutions, the residual blocks' projections of the time vector and the embedders of time and size stay in
16 bit. A projection's block is its whole transformer; those within are blocks of their own.
"""

from .base import Family, Rule, Stacked, count, renamed

_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _diffusers(shapes):
    out = renamed(_TOP)

    def transformer(ours, theirs):
        """Within a transformer the names are the same."""
        found = [k.removeprefix(f"{theirs}.") for k in shapes if k.startswith(f"{theirs}.")]
        out.update({f"{ours}.{name}": Stacked((f"{theirs}.{name}",)) for name in found})
        return bool(found)

    def residual(ours, theirs):
        out.update(renamed(_RESIDUAL, f"{ours}.", f"{theirs}."))

    n = 1
    for level in (f"down_blocks.{x}" for x in range(count(shapes, "down_blocks"))):
        for i in range(count(shapes, f"{level}.resnets")):
            residual(f"input_blocks.{n}.0", f"{level}.resnets.{i}")
            transformer(f"input_blocks.{n}.1", f"{level}.attentions.{i}")
            n += 1
        out |= renamed({f"input_blocks.{n}.0.op": f"{level}.downsamplers.0.conv"})
        n += count(shapes, f"{level}.downsamplers")
    for i, j in ((0, 0), (2, 1)):
        residual(f"middle_block.{i}", f"mid_block.resnets.{j}")
    transformer("middle_block.1", "mid_block.attentions.0")
    n = 0
    for level in (f"up_blocks.{x}" for x in range(count(shapes, "up_blocks"))):
        last = 0
        for i in range(count(shapes, f"{level}.resnets")):
            residual(f"output_blocks.{n}.0", f"{level}.resnets.{i}")
            last = 2 if transformer(f"output_blocks.{n}.1", f"{level}.attentions.{i}") else 1
            n += 1
        out |= renamed({f"output_blocks.{n - 1}.{last}.conv": f"{level}.upsamplers.0.conv"})
    return {k: s for k, s in out.items() if s.keys[0] in shapes}


SDXL = Family(
    name="sdxl",
    title="SDXL",
    block=r"(?:(?:input|output)_blocks\.\d+\.1|middle_block\.1)(?:\.transformer_blocks\.\d+)?",
    rules=(
        Rule(r"proj_in"),
        Rule(r"attn1\.to_q"),
        Rule(r"attn1\.to_[kv]", shared_input="{block}.attn1.to_q"),
        Rule(r"attn1\.to_out\.0"),
        Rule(r"attn2\.to_q"),
        # Every block's keys and values come from the same text: one set of statistics for all.
        Rule(r"attn2\.to_[kv]", shared_input="{first}.attn2.to_k"),
        Rule(r"attn2\.to_out\.0"),
        Rule(r"ff\.net\.0\.proj"),
        Rule(r"ff\.net\.2"),
        Rule(r"proj_out"),
    ),
    kept=((r".+\.emb_layers\.1", "the time vector of a residual block, 0.6 % of SDXL"),),
    signature=("input_blocks.0.0.weight", "label_emb.0.0.weight", "out.2.weight"),
    diffusers_signature=("conv_in.weight", "add_embedding.linear_1.weight", "conv_out.weight"),
    # SD 1, SD 2 and Stable Video Diffusion have transformers at full resolution.
    without=("input_blocks.1.1.", "down_blocks.0.attentions."),
    diffusers=_diffusers,
    diffusers_class="UNet2DConditionModel",
    chain=False,  # skip connections
)
