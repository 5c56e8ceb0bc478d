"""`nibble bench`: the kernels against PyTorch and comfy-kitchen, checked before they are timed. Never
imported by the pack's nodes."""
