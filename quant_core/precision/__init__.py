"""Which bits for which layer: measured candidates, a budget, and the choice."""
