"""OpenCola: continuous latent diffusion language models (Cola DLM) and the baselines they are measured against."""

__version__ = "0.1.0"
