"""Training: the step (`step`, `optim`), the steps in a row (`loop`), what survives (`checkpoint`), on Ray Train (`trainer`)."""
