"""What a model writes: under a judge, in its variety, beside real texts."""
