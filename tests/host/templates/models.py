"""The public files that the templates ask for: ComfyUI offers to download what is missing. Names, folders and
addresses are those of ComfyUI's own templates where it has the model."""

HUB = "https://huggingface.co/"
FILES = {
    "flux1-dev.safetensors": ("diffusion_models", "Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors"),
    "clip_l.safetensors": (
        "text_encoders",
        "comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors",
    ),
    "t5xxl_fp16.safetensors": (
        "text_encoders",
        "comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors",
    ),
    "ae.safetensors": (
        "vae",
        "Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
    ),
    "flux-2-klein-4b.safetensors": (
        "diffusion_models",
        "Comfy-Org/flux2-klein/resolve/main/split_files/diffusion_models/flux-2-klein-4b.safetensors",
    ),
    "qwen_3_4b.safetensors": (
        "text_encoders",
        "Comfy-Org/flux2-klein/resolve/main/split_files/text_encoders/qwen_3_4b.safetensors",
    ),
    "flux2-vae.safetensors": (
        "vae",
        "Comfy-Org/flux2-dev/resolve/main/split_files/vae/flux2-vae.safetensors",
    ),
    "qwen_image_bf16.safetensors": (
        "diffusion_models",
        "Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/diffusion_models/qwen_image_bf16.safetensors",
    ),
    "qwen_image_edit_2511_bf16.safetensors": (
        "diffusion_models",
        "Comfy-Org/Qwen-Image-Edit_ComfyUI/resolve/main/split_files/diffusion_models/"
        "qwen_image_edit_2511_bf16.safetensors",
    ),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": (
        "text_encoders",
        "Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/text_encoders/"
        "qwen_2.5_vl_7b_fp8_scaled.safetensors",
    ),
    "qwen_image_vae.safetensors": (
        "vae",
        "Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/vae/qwen_image_vae.safetensors",
    ),
    "wan2.1_t2v_1.3B_fp16.safetensors": (
        "diffusion_models",
        "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/diffusion_models/"
        "wan2.1_t2v_1.3B_fp16.safetensors",
    ),
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": (
        "text_encoders",
        "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/text_encoders/"
        "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    ),
    "wan_2.1_vae.safetensors": (
        "vae",
        "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/vae/wan_2.1_vae.safetensors",
    ),
    "sd_xl_base_1.0.safetensors": (
        "checkpoints",
        "stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
    ),
    "pixart_sigma_1024.safetensors": (
        "diffusion_models",
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS/resolve/main/transformer/diffusion_pytorch_model.safetensors",
    ),
    "sdxl_vae.safetensors": ("vae", "stabilityai/sdxl-vae/resolve/main/sdxl_vae.safetensors"),
    "svdq-int4_r32-flux.1-dev.safetensors": (
        "diffusion_models",
        "nunchaku-ai/nunchaku-flux.1-dev/resolve/main/svdq-int4_r32-flux.1-dev.safetensors",
    ),
    "FLUX-dev-lora-add_details.safetensors": (
        "loras",
        "Shakker-Labs/FLUX.1-dev-LoRA-add-details/resolve/main/FLUX-dev-lora-add_details.safetensors",
    ),
    "FLUX-dev-lora-AntiBlur.safetensors": (
        "loras",
        "Shakker-Labs/FLUX.1-dev-LoRA-AntiBlur/resolve/main/FLUX-dev-lora-AntiBlur.safetensors",
    ),
}


def models_of(values) -> list[dict]:
    """What a node's properties.models says of the files among its values."""
    return [
        {"name": value, "url": HUB + FILES[value][1], "directory": FILES[value][0]}
        for value in values
        if isinstance(value, str) and value in FILES
    ]
