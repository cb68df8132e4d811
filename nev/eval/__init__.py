"""What a vision encoder is worth: zero-shot classification, retrieval, and their pictures."""
