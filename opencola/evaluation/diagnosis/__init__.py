"""Which link of a Cola DLM loses text."""
