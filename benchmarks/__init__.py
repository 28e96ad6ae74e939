"""Measurements with a goal each; ``python -m benchmarks.run_all`` runs them and writes the docs.

A module of this folder is a benchmark when it assigns a string to ``BENCHMARK``, its title; its
docstring introduces it in the docs. It runs alone as ``python -m benchmarks.NAME [--quick]
[--json FILE]``, which :func:`benchmarks._report.main` gives it.
"""
