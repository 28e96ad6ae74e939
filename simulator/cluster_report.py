"""A load report of one engine model, as a llumlet would make it at this moment.

Invariant: it says what the instance knows, and no output length. `victim_blocks` is left out, so
the scheduler takes the mean; finding the request that would move next at every report would cost
more than all the rest of a report. This module does not know when reports are made.
"""

from __future__ import annotations

from collections.abc import Iterator

from llumsched.core.events import KvBlocksRemoved, KvBlocksStored
from llumsched.core.load import InstanceLoad
from llumsched.simulator.engine_base import Engine
from llumsched.simulator.kernel import PS_PER_S


def read_load(
    engine: Engine, now: int, num_migrations_in: int, num_migrations_out: int
) -> InstanceLoad:
    """The report; what came and ended since the last one is told in it, once."""
    engine.num_reports += 1
    num_free_blocks, step_ps = engine.free_and_step_time_at(now)
    num_running = len(engine.running)
    num_high = engine.num_high_running
    waiting = engine.waiting
    prefill_tokens = engine.num_waiting_tokens
    for request, _ in engine.prefills:
        prefill_tokens += request.target - request.computed
    received, finished = engine.received_ids, engine.finished_ids
    if received:
        engine.received_ids = []
    if finished:
        engine.finished_ids = []
    return InstanceLoad(
        instance_id=engine.instance_id,
        sequence=engine.num_reports,
        num_total_blocks=engine.num_blocks,
        num_free_blocks=num_free_blocks,
        num_reserved_blocks=engine.num_reserved,
        num_running=num_running,
        num_waiting=len(waiting) + len(engine.holding),
        head_of_line_blocks=-(-waiting[0].target // engine.block_size) if waiting else 0,
        num_waiting_blocks=engine.num_waiting_blocks,
        num_waiting_tokens=engine.num_waiting_tokens,
        num_prefill_tokens_pending=prefill_tokens,
        step_time_s=step_ps / PS_PER_S,
        num_running_by_class=(
            ((0, num_running - num_high), (1, num_high)) if num_high else ((0, num_running),)
        ),
        num_migrations_in=num_migrations_in,
        num_migrations_out=num_migrations_out,
        received_request_ids=tuple(received),
        finished_request_ids=tuple(finished),
    )


def kv_events(engine: Engine, num_free_blocks: int) -> Iterator[KvBlocksRemoved | KvBlocksStored]:
    """What has changed in the engine's prefix cache since the last report."""
    assert engine.cache is not None
    engine.cache.shrink(num_free_blocks)
    stored, removed = engine.cache.changes()
    if removed:
        yield KvBlocksRemoved(instance_id=engine.instance_id, block_hashes=removed)
    if stored:
        yield KvBlocksStored(instance_id=engine.instance_id, block_hashes=stored)
