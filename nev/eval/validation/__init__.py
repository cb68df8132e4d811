"""A run's own set as a suite of tasks, scored in training and after it."""
