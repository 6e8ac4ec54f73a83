"""A server that speaks OpenAI's protocol, for every family."""
