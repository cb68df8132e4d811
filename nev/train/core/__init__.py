"""The mathematics of a training step: torch on tensors and modules; no job, no run, no Ray."""
