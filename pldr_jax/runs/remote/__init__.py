"""Runs whose folder is in a bucket."""
