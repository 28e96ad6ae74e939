"""Step times measured on a vLLM engine, for the simulator."""
