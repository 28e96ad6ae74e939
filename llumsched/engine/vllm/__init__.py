"""The adapter to vLLM, and with the frontend the one place that knows its internals."""
