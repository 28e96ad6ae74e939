"""Engines as the scheduler needs them: the ports, the adapter to vLLM, and one to test with."""
