"""The one place that knows what a location is: local paths and `s3://` alike."""
