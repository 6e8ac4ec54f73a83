"""A recipe, and the run that it describes."""
