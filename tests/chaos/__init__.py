"""Faults of every kind, and what clients see of them. A package, so that its pool ends with it."""
