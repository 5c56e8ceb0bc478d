"""The templates around the one node: making a 4-bit model, and LoRAs, comparing and the report with it; and
nunchaku's files, which are ready already."""

from comfyui_nibble.tests.host.templates.describe import Group, Node, Template, node
from comfyui_nibble.tests.host.templates.parts import (
    NEGATIVE,
    PROMPT,
    compare,
    flux_loaders,
    flux_prompt,
    flux_vae,
    for_my_card,
    help_on,
    picture,
    picture_size,
)

PAGE = help_on("NibbleQuantizeForMyCard")
MAKE = (
    "choose a *wish* and press Run. The first run makes the 4-bit model, saves it and says how close it is; "
    "later runs find it and start at once."
)


def one_node(
    key: str, title: str, heading: str, files: str, loaders: list, made: Node, draw: list
) -> Template:
    """A template that quantizes with the one node and draws."""
    return Template(
        key,
        title,
        f"""## {heading}

1. **Load**: get the files with the *Download* buttons that ComfyUI shows. {files}
2. **Quantize**: {MAKE}
3. **Draw** with it, as with any model: samplers, LoRAs and ControlNets take it.

{PAGE}
""",
        [[Group("1 Load", [loaders]), Group("2 Quantize", [[made]]), Group("3 Draw", draw)]],
        stacked=True,
    )


def flux() -> Template:
    load, clip = flux_loaders()
    vae, size = flux_vae(), picture_size()
    made = for_my_card(load, clip, vae)
    prompt, guidance, zero = flux_prompt(clip)
    sampler, decoded, saved = picture(made, guidance, zero, size, vae, "flux_one_node")
    return one_node(
        "flux_one_node",
        "01 FLUX.1 in 4 bit with one node",
        "FLUX.1 dev in 4 bit",
        "The model has 24 GB, its 4-bit copy about 7.",
        [load, clip, vae],
        made,
        [[prompt, guidance, zero, size], [sampler, decoded, saved]],
    )


def klein() -> Template:
    load = node("UNETLoader", unet_name="flux-2-klein-4b.safetensors")
    clip = node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="flux2")
    vae = node("VAELoader", vae_name="flux2-vae.safetensors")
    made = for_my_card(load, clip, vae)
    prompt = node("CLIPTextEncode", "Prompt", fill=True, text=PROMPT, clip=clip)
    zero = node("ConditioningZeroOut", "No negative prompt", conditioning=prompt)
    size = picture_size("EmptyFlux2LatentImage")
    sampler, decoded, saved = picture(made, prompt, zero, size, vae, "klein_one_node", steps=4)
    return one_node(
        "klein_one_node",
        "02 FLUX.2 Klein in 4 bit with one node",
        "FLUX.2 Klein 4B in 4 bit",
        "This is the model of 4 steps.",
        [load, clip, vae],
        made,
        [[prompt, zero, size], [sampler, decoded, saved]],
    )


def qwen_loaders(name: str) -> tuple[Node, Node, Node, Node]:
    """(model, the same with its shift, text encoder, VAE)"""
    load = node("UNETLoader", unet_name=name)
    return (
        load,
        node("ModelSamplingAuraFlow", model=load, shift=3.1),
        node("CLIPLoader", clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors", type="qwen_image"),
        node("VAELoader", vae_name="qwen_image_vae.safetensors"),
    )


def qwen() -> Template:
    load, shift, clip, vae = qwen_loaders("qwen_image_bf16.safetensors")
    made = for_my_card(shift, clip, vae)
    prompt = node("CLIPTextEncode", "Prompt", fill=True, text=PROMPT, clip=clip)
    no = node("CLIPTextEncode", "Negative prompt", fill=True, text=NEGATIVE, clip=clip)
    size = picture_size(width=1328, height=1328)
    sampler, decoded, saved = picture(made, prompt, no, size, vae, "qwen_one_node", cfg=2.5)
    return one_node(
        "qwen_one_node",
        "03 Qwen-Image in 4 bit with one node",
        "Qwen-Image in 4 bit",
        "The model has 41 GB.",
        [load, shift, clip, vae],
        made,
        [[prompt, no, size], [sampler, decoded, saved]],
    )


def edit() -> Template:
    load, shift, clip, vae = qwen_loaders("qwen_image_edit_2511_bf16.safetensors")
    image = node("LoadImage", image="example.png", fill=True)
    scaled = node("FluxKontextImageScale", image=image)
    asked = {"clip": clip, "vae": vae, "image1": scaled}
    what = node(
        "TextEncodeQwenImageEditPlus", "What to change", prompt="make it a snowy winter evening", **asked
    )
    no = node("TextEncodeQwenImageEditPlus", "Negative prompt", prompt="", **asked)
    latent = node("VAEEncode", pixels=scaled, vae=vae)
    made = for_my_card(shift, None, vae, conditioning=what, negative=no, latent_image=latent)
    sampler, decoded, saved = picture(made, what, no, latent, vae, "edit_one_node", cfg=2.5)
    return Template(
        "edit_one_node",
        "04 Qwen-Image-Edit in 4 bit with one node",
        f"""## Qwen-Image-Edit in 4 bit

1. **Load**: get the files with the *Download* buttons that ComfyUI shows. The model has 41 GB.
2. **Describe** what to change in your picture. The model is measured on this picture and these words: take
   such as you use.
3. **Quantize**: {MAKE}
4. **Edit** with it.

{PAGE}
""",
        [
            [
                Group("1 Load", [[load, shift, clip, vae]]),
                Group("2 Describe", [[image, scaled, what, no]]),
                Group("3 Quantize", [[made]]),
                Group("4 Edit", [[latent, sampler, decoded, saved]]),
            ]
        ],
        stacked=True,
    )


def loras() -> Template:
    load, clip = flux_loaders()
    vae, size = flux_vae(), picture_size()
    made = for_my_card(load, clip, show_before_and_after=False)
    first, second = two_loras(made)
    prompt, guidance, zero = flux_prompt(clip)
    sampler, decoded, saved = picture(second, guidance, zero, size, vae, "flux_4bit_two_loras")
    return Template(
        "flux_4bit_two_loras",
        "05 LoRAs on a 4-bit FLUX.1",
        f"""## Two LoRAs on 4-bit FLUX.1 dev

1. **Load** the files with the *Download* buttons.
2. **Quantize**, or find what *FLUX.1 in 4 bit with one node* has saved.
3. **LoRAs**: ComfyUI's own loaders, any number. They stand beside the 4-bit layers in 16 bit; nothing is
   quantized again, so change files and strengths as you like. To keep them in one file, put Bake LoRA and
   Save Model behind them.
4. **Draw.**

{help_on("NibbleQuantizeForMyCard", "NibbleBakeLora")}
""",
        [
            [
                Group("1 Load", [[load, clip, vae]]),
                Group("2 Quantize", [[made]]),
                Group("3 LoRAs", [[first, second]]),
                Group("4 Draw", [[prompt, guidance, zero, size], [sampler, decoded, saved]]),
            ]
        ],
        stacked=True,
    )


def two_loras(model: Node) -> tuple[Node, Node]:
    """Two public LoRAs for FLUX.1 dev, one behind the other."""
    first = node(
        "LoraLoaderModelOnly",
        "First LoRA",
        model=model,
        lora_name="FLUX-dev-lora-add_details.safetensors",
        strength_model=0.8,
    )
    second = node(
        "LoraLoaderModelOnly",
        "Second LoRA",
        model=first,
        lora_name="FLUX-dev-lora-AntiBlur.safetensors",
        strength_model=0.6,
    )
    return first, second


def comparison() -> Template:
    load, clip = flux_loaders()
    vae, size = flux_vae(), picture_size()
    made = for_my_card(load, clip, show_before_and_after=False)
    prompt = node("CLIPTextEncode", "Prompt", fill=True, text=PROMPT, clip=clip)
    guidance = node("FluxGuidance", conditioning=prompt)
    compared = compare([load, made], guidance, size, vae, tall=420)
    both = {"image_a": (compared, "image_a"), "image_b": (compared, "image_b")}
    slider = node("ImageCompare", "Slider", tall=260, **both)
    return Template(
        "flux_compare",
        "06 Compare 16 bit and 4 bit",
        f"""## 16 bit beside 4 bit

1. **Load** the files with the *Download* buttons.
2. **Quantize**, or find what *FLUX.1 in 4 bit with one node* has saved.
3. **Prompt**: both models draw it from the same seed.
4. **Compare**: both pictures, where they differ, by how much, and one over the other with a slider. Try
   several seeds before you decide.

{help_on("NibbleCompare", "NibbleQuantizeForMyCard")}
""",
        [
            [
                Group("1 Load", [[load, clip, vae]]),
                Group("2 Quantize", [[made]]),
                Group("3 Prompt", [[prompt, guidance, size]]),
                Group("4 Compare", [[compared, slider]]),
            ]
        ],
        stacked=True,
    )


def heat_map() -> Template:
    load, clip = flux_loaders()
    made = for_my_card(load, clip, show_before_and_after=False)
    shown = node("NibbleReport", fill=True, wide=560, model=made)
    text = node("PreviewAny", "As a table", fill=True, wide=400, source=(shown, "markdown"))
    return Template(
        "flux_report",
        "07 Report - which layers lose most",
        f"""## What 4 bit did to each layer

1. **Load** the files with the *Download* buttons.
2. **Quantize**, or find what *FLUX.1 in 4 bit with one node* has saved.
3. **Report**: a map of the layers, block by block, with errors and bits; the worst layers and what to do
   about them. In the table's node switch *preview_mode* to Markdown.

{help_on("NibbleReport", "NibbleGuard")}
""",
        [
            [
                Group("1 Load", [[load, clip]]),
                Group("2 Quantize", [[made]]),
                Group("3 Report", [[shown], [text]]),
            ]
        ],
        stacked=True,
        least_height=800,
    )


def nunchaku() -> Template:
    name = "svdq-int4_r32-flux.1-dev.safetensors"
    load = node("NibbleLoadDiffusionModel", model_name=name)
    _, clip = flux_loaders()
    vae, size = flux_vae(), picture_size()
    inspect = node("NibbleInspect", model_name=name)
    text = node("PreviewAny", "What is in the file", fill=True, wide=400, source=(inspect, "report"))
    lora, _ = two_loras(load)
    lora.title = "LoRA"
    prompt, guidance, zero = flux_prompt(clip)
    sampler, decoded, saved = picture(lora, guidance, zero, size, vae, "flux_nunchaku")
    return Template(
        "flux_nunchaku",
        "08 Load a nunchaku file",
        f"""## nunchaku's FLUX.1 dev without nunchaku

1. **Load** the 4-bit file (6.8 GB) with the *Download* buttons. Names with int4 work; those with fp4 are
   refused.
2. **Look inside**: layers, the kernels they run on here, and what reading changes; without notes nothing is
   lost.
3. **LoRA**: ComfyUI's own loader, in 16 bit beside the 4-bit layers.
4. **Draw.** Nothing is calibrated or quantized.

{help_on("NibbleLoadDiffusionModel", "NibbleInspect")}
""",
        [
            [
                Group("1 Load", [[load, clip, vae]]),
                Group("2 Look inside", [[inspect, text]]),
                Group("3 LoRA", [[lora]]),
                Group("4 Draw", [[prompt, guidance, zero, size], [sampler, decoded, saved]]),
            ]
        ],
        stacked=True,
    )


TEMPLATES = [flux(), klein(), qwen(), edit(), loras(), comparison(), heat_map(), nunchaku()]
