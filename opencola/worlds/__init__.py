"""Generated languages whose truth is known: what a model writes in them can be judged exactly."""
