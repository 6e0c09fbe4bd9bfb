"""Text: what is read, which documents it holds, and its tokenizer."""
