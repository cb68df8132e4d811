"""Sets and tasks as data: suites, what they read, and how they are scored."""
