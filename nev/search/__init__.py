"""Search over text and image vectors in the store that people already have: LanceDB, PostgreSQL, or parquet files. No Ray."""
