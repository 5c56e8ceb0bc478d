"""From one format of quantized models to another, and what a file is."""
