"""Files at a location: a local path or an `s3://` URL. No other room knows which of both a location is."""
