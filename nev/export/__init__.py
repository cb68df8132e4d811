"""A trained model in the forms of other tools: transformers, sentence-transformers, ONNX, MLflow, and the released layout."""
