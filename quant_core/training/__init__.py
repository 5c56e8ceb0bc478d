"""Training of quantized models: reconstruction block by block, then distillation of runs of blocks."""
