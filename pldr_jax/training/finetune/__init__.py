"""Runs that begin with the weights of a checkpoint."""
