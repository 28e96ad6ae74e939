"""Llumnix (OSDI '24) simulated beside what it published: the parts of `scripts.reproduce_paper`."""
