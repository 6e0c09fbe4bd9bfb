"""Text of any kind and size, tokenised once into shards."""
