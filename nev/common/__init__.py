"""What all rooms use: errors, signals, the console, progress."""
