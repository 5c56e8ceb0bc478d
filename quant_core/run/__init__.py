"""A whole model, layer by layer: fitted, kept where a run is stopped, and reported."""
