"""The tokenizer of a checkpoint, as transformers reads one."""
