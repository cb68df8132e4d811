"""A trained model, opened from wherever it lies, and called on pictures and sentences. No Ray."""
