"""`train.py`, and the doors to plans and sweeps."""
