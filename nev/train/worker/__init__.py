"""One training process: torch.distributed, blocks, steps, checkpoints. No console, no MLflow."""
