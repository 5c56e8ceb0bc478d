"""Calibration, quantization and formats in plain PyTorch. Never imports comfy."""
