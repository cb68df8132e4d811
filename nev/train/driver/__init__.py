"""The driver of a run: console, MLflow, signals, launching. No torch at import."""
