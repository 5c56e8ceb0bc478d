"""Checkpoints in and out. A format maps names and layouts and nothing else."""
