"""Invariants of a scheduler after every event, whatever happened."""

from __future__ import annotations

from llumsched.core.load import Headroom
from llumsched.core.scheduling.scheduler import GlobalScheduler
from llumsched.core.types import InstanceState, PriorityClass
from tests.core.freeness import Unreported, freeness


def check_invariants(scheduler: GlobalScheduler) -> None:
    cluster, ledger, queue = scheduler._cluster, scheduler._ledger, scheduler._queue
    arbiter, options = scheduler._arbiter, scheduler.options
    held = {record.request.request_id for record in queue.in_order()}

    # A request is held, or on exactly one known instance.
    for request_id, record in ledger.requests.items():
        assert (record.instance_id is None) == (request_id in held)
        assert record.instance_id is None or record.instance_id in cluster.records
    assert held <= ledger.requests.keys()
    assert len(queue) == len(held) <= max(options.max_queued_requests, len(held))

    snapshot = cluster.snapshot
    assert list(snapshot.instance_ids) == sorted(cluster.records)
    for row, instance_id in enumerate(snapshot.instance_ids):
        instance = cluster.records[instance_id]
        on_instance = [r for r in ledger.requests.values() if r.instance_id == instance_id]
        assert ledger.num_on(instance_id) == len(on_instance)

        # The overlay is the sum of what no report has named.
        sent = [r for r in on_instance if r.is_unreported]
        incoming = [
            m for m in arbiter.active.values() if m.destination == instance_id and m.is_overlaid
        ]
        assert instance.num_sent == len(sent) + len(incoming)
        assert instance.num_sent_blocks == (
            sum(r.num_sent_blocks for r in sent) + sum(m.num_blocks for m in incoming)
        )
        assert instance.num_sent_high == sum(
            r.request.execution_priority >= PriorityClass.HIGH for r in sent
        )
        assert instance.predicted_final_blocks == sum(r.num_predicted_blocks for r in on_instance)

        # Slots.
        holding = [m for m in arbiter.active.values() if m.has_slot]
        num_in = sum(m.destination == instance_id for m in holding)
        num_out = sum(m.source == instance_id for m in holding)
        assert snapshot.columns.num_migrations_in[row] == num_in <= options.max_migrations_in
        assert snapshot.columns.num_migrations_out[row] == num_out <= options.max_migrations_out

        # The columns say what the pure functions say.
        serving = instance.state is InstanceState.SERVING
        assert snapshot.columns.is_accepting[row] == (serving and instance.is_fresh)
        assert snapshot.columns.freeness[row] == freeness(
            instance.load,
            headroom=Headroom(target_load=options.high_priority_target_load),
            draining=not serving,
            unreported=Unreported(
                num_requests=instance.num_sent,
                num_blocks=instance.num_sent_blocks,
                num_high=instance.num_sent_high,
            ),
        )
    assert snapshot.num_accepting == int(snapshot.columns.is_accepting.sum())


def check_reconciled(scheduler: GlobalScheduler) -> None:
    """Nothing is left once every request ended, was reported, and every migration is over."""
    assert not scheduler._ledger.requests
    assert not scheduler._arbiter.active
    assert not len(scheduler._queue)
    for instance in scheduler._cluster.records.values():
        assert instance.num_sent == instance.num_sent_blocks == instance.num_sent_tokens == 0
        assert instance.num_sent_high == instance.predicted_final_blocks == 0
        assert instance.num_migrations_in == instance.num_migrations_out == 0
