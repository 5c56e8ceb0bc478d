"""One linear layer, in full precision and quantized: what it is, how it is put together, and what it can
become."""
