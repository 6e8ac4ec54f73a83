"""Tasks, generation quality and likelihood tables."""
