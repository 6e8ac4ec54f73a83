"""Text to tokens and back, and the corpora that training reads."""
