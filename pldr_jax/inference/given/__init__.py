"""Texts that are given: scored, classified, read in one pass."""
