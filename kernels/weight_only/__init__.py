"""Linear layers with quantized weights and 16-bit activations, for few rows: modulation layers, M = batch."""
