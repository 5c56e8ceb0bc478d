"""GPTQ's inner loop as one kernel a block of in-channels, for fitting on a card."""
