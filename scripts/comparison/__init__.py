"""Every shipped policy on public traces: the parts of `scripts.compare_policies`."""
