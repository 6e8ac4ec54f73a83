"""From text to batches of token ids: sources, packing, tokenised shards."""
