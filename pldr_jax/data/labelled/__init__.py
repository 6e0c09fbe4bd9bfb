"""Texts with labels: lines of JSONL to rows of a task."""
