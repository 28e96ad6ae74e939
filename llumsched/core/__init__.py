"""The pure scheduling core: events in, actions out.

Invariant: nothing in this package does I/O, reads a clock, starts a thread or imports Ray or vLLM;
it needs the standard library, numpy and msgspec. The two hosts (the Ray runtime and the simulator)
turn the world into events and carry the actions out.
"""
