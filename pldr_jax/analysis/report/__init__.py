"""Measurements to one page, with figures, tables and tensors."""
