"""Cola DLM: a Text VAE and a block-causal latent prior."""
