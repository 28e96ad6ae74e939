"""Hints read from a request, and answers to requests that are turned away."""
