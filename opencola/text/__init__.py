"""Text to tokens and back, and the files that text comes in."""
