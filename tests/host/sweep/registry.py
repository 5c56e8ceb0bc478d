"""Every class of ComfyUI's `supported_models.models`: its entries, or why it has none."""

from comfyui_nibble.tests.host.sweep import audio_and_3d, flux, images, unets, video, wan

SECTIONS = {
    "FLUX and its kind": flux.ENTRIES,
    "Other image transformers": images.ENTRIES,
    "U-Nets": unets.ENTRIES,
    "Video": video.ENTRIES,
    "Wan": wan.ENTRIES,
    "Audio and 3D": audio_and_3d.ENTRIES,
}
ENTRIES = tuple(entry for entries in SECTIONS.values() for entry in entries)
# One sentence each; docs/models.md says it to users.
WITHOUT = {
    "RT_DETR_v4": "A detector of objects, no diffusion model.",
    "SAM3": "A segmenter, no diffusion model.",
    "SAM31": "A segmenter, no diffusion model.",
    "DepthAnything3": "An estimator of depth, no diffusion model.",
}
