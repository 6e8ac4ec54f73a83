"""What models are worth: benchmarks, latents, sample quality, likelihood, and what of it is sure."""
