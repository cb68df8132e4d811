"""Ray: the connection, tasks, and limits on how far Ray Data runs ahead."""
