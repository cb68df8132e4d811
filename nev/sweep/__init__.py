"""Ablations: many runs of one experiment under other settings and seeds, and statistics of the differences."""
