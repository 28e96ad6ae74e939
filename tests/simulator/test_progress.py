"""Simulated instances tell of the progress of requests what the engine model knows."""

from __future__ import annotations

from typing import Any

import pytest

from llumsched.config import Config
from llumsched.core.events import LoadReported
from llumsched.simulator.cluster import load_reports
from llumsched.simulator.cluster.loop import Cluster
from llumsched.simulator.engines.base import Engine
from llumsched.simulator.engines.request import DECODING
from tests.simulator.clusters import make_hardware, make_options, make_requests

MOVING = Config(
    policy="latency",
    params={"source_below": 100.0, "destination_above": 100.0},
    scheduler={"migration_interval_s": 0.2, "migration_settle_s": 0.5, "follow_requests": True},
)


def test_the_view_is_exact_at_every_report_also_over_moves_and_evictions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace = make_requests(*[(0.05 * i, 40 + 7 * (i % 9), 20 + 60 * (i % 5)) for i in range(60)])
    options = make_options(
        num_instances=2, config=MOVING, hardware=make_hardware(num_blocks=120), report_delay_s=0.0
    )
    cluster = Cluster(trace, options)
    truth: dict[str, dict[str, tuple[int, int]]] = {}
    read = load_reports.read_load

    def read_and_note(engine: Engine, now: int, *args: Any, **kwargs: Any) -> Any:
        load = read(engine, now, *args, **kwargs)
        steps = engine.progress_at(now)
        truth[engine.instance_id] = {
            request.request_id: (
                (steps + request.offset, steps + request.num_output - request.finish_step)
                if request.phase == DECODING
                else (request.computed, request.generated)
            )
            for request in engine.running
        }
        for request in engine.waiting:
            truth[engine.instance_id][request.request_id] = (0, request.generated)
        return load

    monkeypatch.setattr(load_reports, "read_load", read_and_note)
    num_checked = num_entries = num_rows = 0
    handle = cluster._port.scheduler.handle

    def handle_and_check(event: Any, now: float) -> Any:
        nonlocal num_checked, num_entries, num_rows
        actions = handle(event, now)
        if isinstance(event, LoadReported):
            instance_id = event.load.instance_id
            num_entries += len(event.load.progress)
            num_rows += event.load.num_running
            seen = cluster._port.scheduler._cluster.snapshot.requests_on(instance_id)
            for row, request in enumerate(seen.requests):
                known = truth[instance_id].get(request.request_id)
                if known is not None:
                    told = (seen.num_computed_tokens[row], seen.num_output_tokens[row])
                    # Evicted before any report told of it, what it had produced is not known.
                    if known[0] or seen.num_output_tokens[row]:
                        assert told == known, request
                    num_checked += 1
        return actions

    monkeypatch.setattr(cluster._port.scheduler, "handle", handle_and_check)
    result = cluster.run()
    assert num_checked > 500
    assert result.num_preemptions.sum() > 0
    assert any(m.outcome == "committed" for m in result.migrations)
    # Reports tell of those that began, moved, or are in their prompt, not of all.
    assert num_entries < num_rows / 2


def test_nothing_is_told_where_nobody_follows_requests() -> None:
    cluster = Cluster(make_requests((0.0, 40, 50)), make_options(num_instances=1))
    told = []
    handle = cluster._port.scheduler.handle

    def handle_and_note(event: Any, now: float) -> Any:
        if isinstance(event, LoadReported):
            told.append((event.load.num_decode_steps, event.load.progress))
        return handle(event, now)

    cluster._port.scheduler.handle = handle_and_note  # type: ignore[method-assign]
    cluster.run()
    assert set(told) == {(0, ())}
