"""Files that an export copies or fills in."""
