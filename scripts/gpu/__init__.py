"""Checks of KV copying on one GPU, without vLLM and Ray (``scripts.gpu_check``)."""
