"""What a GPU does with this package: parity, training, generation and the public size, in one command of 8 minutes."""
