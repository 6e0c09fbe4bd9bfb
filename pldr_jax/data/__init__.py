"""Text, tokenizer and batches.

`sources` finds documents, `tokenizer` turns text into ids, `corpus` keeps the tokenised text of a
small source in a cache folder; `inputs`, `readers`, `units` and `build` prepare text of any kind
and size as shards, which `prepared` reads. `pipeline` makes shuffled batches of either. Only
`pipeline` imports Grain, and only `shards` array_record.
"""
