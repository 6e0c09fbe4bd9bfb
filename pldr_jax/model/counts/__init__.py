"""Shapes of parameters, and operations, counted."""
