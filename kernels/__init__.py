"""One folder an op: naive.py is the specification, the others are tested against it. `dispatch` says which
one runs and why."""

from .at_load import paths_of, spec_at_load
from .dispatch import choose

__all__ = ["choose", "paths_of", "spec_at_load"]
