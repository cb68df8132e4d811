"""Files of a run, read and written: folder, checkpoints, metrics log, MLflow run. Nothing here trains."""
