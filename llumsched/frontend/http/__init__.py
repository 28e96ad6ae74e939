"""Routes that are added to vLLM's OpenAI server: keys, admin API, metrics."""
