"""nev: give a locked text embedder eyes."""
