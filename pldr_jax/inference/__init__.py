"""Decoding: prefill, the decode step, sampling, and the engine that drives them."""
