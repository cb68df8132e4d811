"""Ablations: the same training under other settings and seeds, and what can be said of the difference."""
