"""Attention, masks, caches and transformer blocks; torch only."""
