"""Suites: sets and tasks as data, how a set is read, how a task is scored."""
