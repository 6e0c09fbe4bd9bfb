"""`pldr-serve`: the engine behind HTTP in the wire format of OpenAI's API, and a page."""
