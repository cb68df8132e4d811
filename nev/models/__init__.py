"""The two towers: `text` is locked, `vision` is trained, `nomic` is the layout in which the released vision tower lies."""
