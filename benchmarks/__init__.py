"""Speed and memory, as JSON lines."""
