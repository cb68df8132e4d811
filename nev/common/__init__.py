"""What every room uses: errors, signals, the console, progress."""
