"""Models of an inference engine: steps, batches, KV cache."""
