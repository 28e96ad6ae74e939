"""The OpenAI server: vLLM's own application over a client that routes to many instances."""
