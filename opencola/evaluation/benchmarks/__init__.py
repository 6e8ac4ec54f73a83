"""The eight benchmarks: prompts, answers, and how they are graded."""
