"""What a run leaves behind: its folder, checkpoints, metrics and MLflow run. Read here by all; nothing here trains."""
