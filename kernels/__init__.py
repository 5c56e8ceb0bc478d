"""One folder an op: naive.py is the specification, the others are tested against it. `dispatch` says which
one runs and why."""

from .dispatch import choose, paths_of, spec_at_load

__all__ = ["choose", "paths_of", "spec_at_load"]
