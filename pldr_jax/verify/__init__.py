"""Whether the numbers are right on this machine: the package against its own goldens, and a
checkpoint against itself and what is published of it.
"""
