"""The adapter to vLLM, and with the frontend the one place that knows its internals."""

from llumsched.engine.vllm.notices import put_right

# Before anything of vLLM's is imported, in every process that has an adapter.
put_right()
