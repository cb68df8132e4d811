"""The way from shard to block: row groups (`index`), rows of a step (`plan`), arrays (`block`, `decode`), Ray Data (`stream`)."""
