"""The deductive outputs as matrices, by layer and head."""
