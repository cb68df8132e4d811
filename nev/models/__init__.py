"""The two towers: `text`, which is locked, and `vision`, which is trained. `nomic` is the layout of the released vision tower."""
