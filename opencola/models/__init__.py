"""Whole language models, built from the rooms above."""
