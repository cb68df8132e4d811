"""What happens to a run when things are killed under it: a cluster of real processes, and a table of faults."""
