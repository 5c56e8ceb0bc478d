"""Models as diffusers loads them: calibrated, trained on, and filled with quantized layers."""
