"""Layers as ComfyUI and comfy-kitchen keep them: convrot_w4a4, svdquant_w4a4, int8_tensorwise, awq_w4a16."""
