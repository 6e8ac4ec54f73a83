"""Models in files: the public release's format, Hugging Face's, and our own."""
