"""Text, tokenizer and batches.

`text` finds documents and turns them into ids, `shards` prepares them as files of tokens, in a
folder of the user's or in the cache; `mixture` opens what a run trains on, `rows` cuts it into rows
and `pipeline` makes shuffled batches of those. Only `pipeline` imports Grain, and only
`shards/records.py` array_record.
"""
