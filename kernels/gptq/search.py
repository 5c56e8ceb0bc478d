"""The scales that GPTQ tries for a group of weights."""

# Of the largest weight's, evenly spaced from 1 down: 0.1 to 0.4 dB of the output on ten kinds of inputs.
FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
# On the nvfp4 grid: 1.5 brings the largest weight to 4 in place of 6.
NVFP4_FRACTIONS = (1.5, 1.375, 1.25, 1.125, 1.0, 0.875, 0.75)
