"""A model and an index behind HTTP: embeddings in OpenAI's form, search, metrics, and a page."""
