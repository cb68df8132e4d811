"""Offline work: rows of any source become shards, filtered, resized, in random order, restartable."""
