"""Evaluation of a checkpoint: zero-shot classification, retrieval, the geometry of the space, and a page of them."""
