"""Is G_LM the same tensor for every text, and with caches as without?"""
