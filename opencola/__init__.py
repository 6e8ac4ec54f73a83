"""OpenCola: continuous latent diffusion language models (Cola DLM) and the baselines they are measured against."""
