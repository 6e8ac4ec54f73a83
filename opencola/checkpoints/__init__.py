"""Models in files: the public release's format, our own, Hugging Face's."""
