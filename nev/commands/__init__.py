"""The commands of nev, a module each: options in, a function of the rooms below called, its result printed."""
