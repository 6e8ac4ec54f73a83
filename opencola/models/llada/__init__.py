"""LLaDA, the baseline that writes by unmasking."""
