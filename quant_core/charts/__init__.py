"""Drawings of the pack: one style, readable at the width of a node, as PNG and as pixels."""
