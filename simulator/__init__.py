"""The simulator: the second host of :mod:`llumsched.core`, on a virtual clock.

It will deliver events to the same ``GlobalScheduler`` that serves production traffic, with load
reports as old as they are in production, and carry the decisions out on modelled instances. It
imports neither an engine nor Ray, so that it runs on a laptop with none of them installed.

The package is empty so far: its place in the layout and its import rules are fixed, its contents
are not written yet.
"""
