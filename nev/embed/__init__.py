"""Towers at work on many rows: pictures and captions, on one machine or on Ray."""
