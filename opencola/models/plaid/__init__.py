"""Plaid, the baseline that diffuses embeddings of tokens."""
