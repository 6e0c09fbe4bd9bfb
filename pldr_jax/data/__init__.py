"""Text, tokenizer and batches.

`sources` finds documents, `tokenizer` turns text into ids, `corpus` keeps the tokenised text in a
cache folder, and `pipeline` cuts it into shuffled batches. Only `pipeline` imports Grain.
"""
