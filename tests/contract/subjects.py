"""Questions of a contract test to two instances, be they simulated or real."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

BLOCK_SIZE = 32
NUM_BLOCKS = 16
"""KV blocks that requests of one instance can have."""
MAX_BATCHED_TOKENS = 1024
MOST_RESERVED_AHEAD = 2
"""Blocks that a request may hold after a migration before it needs them."""


class TwoInstances(Protocol):
    """Two instances at rest, stepped by hand."""

    def submit(self, request_id: str, prompt: Sequence[int], num_output_tokens: int) -> None:
        """Send a request to instance 0; it ends after exactly this many tokens."""

    def until(self, condition: Callable[[], bool]) -> None:
        """Step both until something is so."""

    def num_tokens(self, request_id: str) -> int:
        """Tokens of output that the client has; those of a finished request are all."""

    def num_preemptions(self, request_id: str) -> int:
        """How often a running request was evicted."""

    def num_used_blocks(self, index: int) -> int:
        """Blocks in use between the step that has ended and the next."""

    def move(self, request_id: str) -> None:
        """Migrate a request from instance 0 to instance 1, while both are stepped."""
