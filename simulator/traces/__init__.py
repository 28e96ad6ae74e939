"""Traces of requests: read from files or generated."""
