"""Quantization of activations: transform, scale, round, pack, and the low-rank branch's projection down, in
one pass over x."""
