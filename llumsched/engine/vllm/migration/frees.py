"""When the blocks of a request that has ended may be given to one that arrives.

A step that was scheduled before a request ended may be in flight, and write a token into its last
block. vLLM's later steps wait for their turn on the device, so to them it makes no difference. What
is copied into blocks does not wait. So blocks are free only when no step in flight has the request,
by vLLM's own ``defer_block_free``, which it turns on for connectors that receive KV, for the same
reason. With one step at a time nothing is deferred.

Invariant: no block is reserved that a step in flight writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.v1.core.sched.scheduler import Scheduler


class DeferredFrees:
    """Makes a scheduler defer frees; create it before the first step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._last_unfenced_step = 0
        scheduler.defer_block_free = True

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Blocks are free at once meanwhile, and those deferred before; nothing may be scheduled.

        vLLM empties the prefix cache only when every block is free. ``are_fenced`` is false from
        then on until the steps in flight are over.
        """
        scheduler = self._scheduler
        while scheduler.deferred_frees:
            _, blocks = scheduler.deferred_frees.popleft()
            scheduler.kv_cache_manager.block_pool.free_blocks(reversed(blocks))
        scheduler.defer_block_free = False
        try:
            yield
        finally:
            scheduler.defer_block_free = True
            self._last_unfenced_step = scheduler.sched_step_seq

    @property
    def are_fenced(self) -> bool:
        """True if no step in flight writes to a block that is free."""
        num_processed: int = self._scheduler.processed_step_seq
        return num_processed >= self._last_unfenced_step
