"""Noise to latents: paths, solvers, likelihoods and the diffusion transformer."""
