"""One folder an op: naive.py is the specification, the others are tested against it. `dispatch` says which one runs and why."""

from .dispatch import choose, quant_linear

__all__ = ["choose", "quant_linear"]
