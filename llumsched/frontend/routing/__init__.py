"""The client of vLLM's engine cores that routes each request to its instance."""
