"""The templates that calibrate, quantize and save in steps of their own."""

from comfyui_nibble.tests.host.templates.describe import Group, Template, node
from comfyui_nibble.tests.host.templates.parts import (
    NEGATIVE,
    PROMPT,
    flux_calibrate,
    flux_loaders,
    flux_prompt,
    flux_vae,
    help_on,
    picture,
    picture_size,
    read,
    report_of,
)

PAGES = help_on("NibbleCalibrate", "NibbleQuantize", "NibbleSaveModel")


def flux() -> Template:
    load, clip = flux_loaders()
    calibrate, calibration = flux_calibrate(load, clip)
    quantize = node("NibbleQuantize", model=load, calibration=calibration)
    save = node("NibbleSaveModel", model=quantize, filename_prefix="diffusion_models/flux1-dev-4bit")
    prompt, guidance, zero = flux_prompt(clip)
    size, vae = picture_size(), flux_vae()
    sampler, decoded, saved = picture(quantize, guidance, zero, size, vae, "flux_4bit")
    return Template(
        "flux_4bit",
        "09 Step by step - FLUX.1",
        f"""## FLUX.1 dev in 4 bit, step by step

1. **Load** the 16-bit files.
2. **Calibrate**: 6 rounds of 16 runs of 12 steps, about as long as 58 pictures. A *memory_gb* of 20.4
   makes a single round. A stopped run goes on where it was.
3. **Quantize** and save: 6.7 GB in output/diffusion_models.
4. **Draw** with the 4-bit model.
5. **Read** how close each layer is.

**Disk:** About 22 GB of statistics in output/nibble_calibration, 3 GB with *second_moments* off. Delete
   them afterwards.

{PAGES}
""",
        [
            [
                Group("1 Load", [[load, clip]]),
                calibrate,
                Group("3 Quantize", [[quantize, save]]),
            ],
            [
                Group("4 Draw", [[prompt, guidance, zero], [size, vae], [sampler], [decoded, saved]]),
                Group("5 Read", [read(quantize)]),
            ],
        ],
    )


def pixart() -> Template:
    load = node("UNETLoader", unet_name="pixart_sigma_1024.safetensors")
    clip = node("CLIPLoader", clip_name="t5xxl_fp16.safetensors", type="pixart")
    prompts = node("NibbleCalibrationPrompts", fill=True, clip=clip)
    negative = node("CLIPTextEncode", "Negative prompt for calibration", fill=True, text=NEGATIVE, clip=clip)
    size = node("EmptyLatentImage", "Size for calibration", width=1024, height=1024)
    calibrate = node(
        "NibbleCalibrate",
        model=load,
        dotted={"conditioning.positive0": prompts},
        negative=negative,
        latent_image=size,
        cfg=4.5,
    )
    quantize = node("NibbleQuantize", model=load, calibration=calibrate)
    save = node("NibbleSaveModel", model=quantize, filename_prefix="diffusion_models/pixart-sigma-4bit")
    prompt = node("CLIPTextEncode", "Prompt", fill=True, text=PROMPT, clip=clip)
    no = node("CLIPTextEncode", "Negative prompt", fill=True, text=NEGATIVE, clip=clip)
    out, vae = picture_size("EmptyLatentImage"), node("VAELoader", vae_name="sdxl_vae.safetensors")
    sampler, decoded, saved = picture(quantize, prompt, no, out, vae, "pixart_4bit", cfg=4.5)
    return Template(
        "pixart_4bit",
        "12 Step by step - PixArt-Sigma",
        f"""## PixArt-Sigma in 4 bit, step by step

1. **Load** the files. The model downloads as diffusion_pytorch_model.safetensors: rename it.
2. **Calibrate**: 16 runs of 12 steps, about as long as 10 pictures.
3. **Quantize** and save in output/diffusion_models.
4. **Draw** with the 4-bit model.
5. **Read** how close each layer is.

**Disk:** About 2.5 GB of statistics in output/nibble_calibration, 0.6 GB with *second_moments* off.
   Delete them afterwards.

{PAGES}
""",
        [
            [
                Group("1 Load", [[load, clip]]),
                Group("2 Calibrate", [[prompts, negative, size], [calibrate]]),
                Group("3 Quantize", [[quantize, save]]),
            ],
            [
                Group("4 Draw", [[prompt, no], [out, vae], [sampler], [decoded, saved]]),
                Group("5 Read", [read(quantize)]),
            ],
        ],
    )


def sdxl() -> Template:
    load = node("CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    clip, vae = (load, "CLIP"), (load, "VAE")
    prompts = node("NibbleCalibrationPrompts", fill=True, clip=clip)
    negative = node("CLIPTextEncode", "Negative prompt for calibration", fill=True, text=NEGATIVE, clip=clip)
    size = node("EmptyLatentImage", "Size for calibration", width=1024, height=1024)
    calibrate = node(
        "NibbleCalibrate",
        model=load,
        dotted={"conditioning.positive0": prompts},
        negative=negative,
        latent_image=size,
        cfg=7.0,
        scheduler="normal",
    )
    quantize = node("NibbleQuantize", model=load, calibration=calibrate)
    save = node("NibbleSaveModel", model=quantize, filename_prefix="diffusion_models/sdxl-base-4bit")
    prompt = node("CLIPTextEncode", "Prompt", fill=True, text=PROMPT, clip=clip)
    no = node("CLIPTextEncode", "Negative prompt", fill=True, text=NEGATIVE, clip=clip)
    out = picture_size("EmptyLatentImage")
    sampler, decoded, saved = picture(
        quantize, prompt, no, out, vae, "sdxl_4bit", cfg=7.0, steps=25, scheduler="normal"
    )
    return Template(
        "sdxl_4bit",
        "11 Step by step - SDXL",
        f"""## SDXL in 4 bit, step by step

1. **Load** the checkpoint.
2. **Calibrate**: 2 rounds of 16 runs of 12 steps, about as long as 15 pictures. A *memory_gb* of 7 makes
   a single round.
3. **Quantize** the linear layers of the U-Net and save: 2.1 GB instead of 5.1. Convolutions stay in 16 bit.
4. **Draw** with the 4-bit model.
5. **Read** how close each layer is.

**Disk:** About 7.2 GB of statistics in output/nibble_calibration, 1.6 GB with *second_moments* off.
   Delete them afterwards.

{PAGES}
""",
        [
            [
                Group("1 Load", [[load]]),
                Group("2 Calibrate", [[prompts, negative, size], [calibrate]]),
                Group("3 Quantize", [[quantize, save]]),
            ],
            [
                Group("4 Draw", [[prompt, no], [out, decoded], [sampler], [saved]]),
                Group("5 Read", [read(quantize)]),
            ],
        ],
    )


CLIP_PROMPT = (
    "a small red boat sails past a lighthouse on a rocky coast at dawn, waves roll in, soft mist over the "
    "sea, the camera follows slowly"
)
CLIP_NEGATIVE = "blurry, low quality, still picture, subtitles"


def wan() -> Template:
    load = node("UNETLoader", unet_name="wan2.1_t2v_1.3B_fp16.safetensors")
    shift = node("ModelSamplingSD3", model=load, shift=8.0)
    clip = node("CLIPLoader", clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors", type="wan")
    prompts = node("NibbleCalibrationPrompts", fill=True, clip=clip)
    negative = node(
        "CLIPTextEncode", "Negative prompt for calibration", fill=True, text=CLIP_NEGATIVE, clip=clip
    )
    size = node("EmptyHunyuanLatentVideo", "Clip for calibration", width=416, height=240, length=17)
    sampling = {"sampler_name": "uni_pc", "cfg": 6.0}
    calibrate = node(
        "NibbleCalibrate",
        model=shift,
        dotted={"conditioning.positive0": prompts},
        negative=negative,
        latent_image=size,
        steps=15,
        **sampling,
    )
    quantize = node("NibbleQuantize", model=shift, calibration=calibrate)
    save = node("NibbleSaveModel", model=quantize, filename_prefix="diffusion_models/wan2.1-t2v-1.3B-4bit")
    prompt = node("CLIPTextEncode", "Prompt", fill=True, text=CLIP_PROMPT, clip=clip)
    no = node("CLIPTextEncode", "Negative prompt", fill=True, text=CLIP_NEGATIVE, clip=clip)
    out = node("EmptyHunyuanLatentVideo", "Size of the clip", width=832, height=480, length=33)
    vae = node("VAELoader", vae_name="wan_2.1_vae.safetensors")
    sampler, decoded, _ = picture(quantize, prompt, no, out, vae, "", steps=30, **sampling)
    video = node("CreateVideo", images=decoded, fps=16)
    saved = node("SaveVideo", fill=True, video=video, filename_prefix="video/wan_4bit")
    return Template(
        "wan_4bit",
        "10 Step by step - Wan 2.1 video",
        f"""## Wan 2.1 (1.3B) in 4 bit, step by step

1. **Load** the files.
2. **Calibrate** on short clips: 2 rounds of 16 runs of 15 steps, at most as long as 2 clips. A
   *memory_gb* of 5 makes a single round.
3. **Quantize**, save 0.9 GB instead of 2.8, and **read** how close each layer is.
4. **Draw** a clip. Keep ModelSamplingSD3 behind the saved model.

**Disk:** About 4.9 GB of statistics in output/nibble_calibration, 1 GB with *second_moments* off.

{PAGES}
""",
        [
            [
                Group("1 Load", [[load, shift, clip]]),
                Group("2 Calibrate", [[prompts, negative, size], [calibrate]]),
                Group("3 Quantize and read", [[quantize, save, report_of(quantize)]]),
            ],
            [
                Group("4 Draw", [[prompt, no], [out], [sampler], [vae, decoded], [video, saved]]),
            ],
        ],
    )


TEMPLATES = [flux(), wan(), sdxl(), pixart()]
