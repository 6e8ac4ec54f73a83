"""Training: knows ``loss(batch)`` and no model family."""
