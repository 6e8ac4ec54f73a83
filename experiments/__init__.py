"""The research questions as runnable experiments: recipes, results as JSONL, figures."""
