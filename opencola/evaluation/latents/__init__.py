"""How a Cola DLM's latents hold text."""
