"""Ray: the connection, tasks, and what keeps it from running too far ahead."""
