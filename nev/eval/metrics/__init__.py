"""Arrays in, numbers out: no file, no config."""
