"""Whom an engine model tells what happened in a step, at the end of that step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from llumsched.simulator.engines.request import LiveRequest

if TYPE_CHECKING:
    from llumsched.simulator.engines.base import Engine


class EngineHost(Protocol):
    """The cluster, to its engines."""

    def finished(self, engine: Engine, request: LiveRequest, now: int) -> None:
        """The last token of a request has come."""

    def suspended(self, engine: Engine, request: LiveRequest, now: int) -> None:
        """A request is out of the batch and keeps its blocks, as was asked for."""

    def load_changed(self, engine: Engine, num_free_blocks: int, now: int) -> None:
        """Somebody came into or left queue or batch; these blocks are free for the coming step."""

    def preempted(self, engine: Engine, request: LiveRequest, now: int) -> None:
        """A request has lost its blocks and waits at the front of the queue."""
