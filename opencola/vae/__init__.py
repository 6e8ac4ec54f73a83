"""Tokens to continuous latents and back."""
