"""Pictures of what is being sampled, as KSampler shows them."""

import latent_preview
import torch
from comfy.model_patcher import ModelPatcher


class Previews:
    """By the method that ComfyUI was started with (--preview-method); none where that is none.

    The last picture of each sample stays, a few kB: passes that run blocks again sample nothing that could be
    seen.
    """

    def __init__(self, model: ModelPatcher) -> None:
        format = model.get_model_object("latent_format")
        self._previewer = latent_preview.get_previewer(model.load_device, format)
        self._last: dict[int, tuple] = {}

    def of(self, sample: int, x0: torch.Tensor) -> tuple | None:
        """The picture of a denoised latent, for a ProgressBar."""
        if self._previewer is None:
            return None
        x0 = x0.tensors[0] if x0.is_nested else x0
        self._last[sample] = picture = self._previewer.decode_latent_to_preview_image("JPEG", x0)
        return picture

    def last(self, sample: int) -> tuple | None:
        """The last one of a sample that was sampled before; None where there is none."""
        return self._last.get(sample)
