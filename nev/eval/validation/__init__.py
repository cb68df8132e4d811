"""A run's own set: embedded and scored while it trains, and after it."""
