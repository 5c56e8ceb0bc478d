"""What a quantized linear layer is and computes, in PyTorch alone: its description, transforms, quantizers
and packed codes."""
