"""Whole clusters: what must hold whatever happens in them."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from llumsched.core.events import MigrationOutcome
from llumsched.replay import replay
from llumsched.simulator.cluster.loop import Cluster
from llumsched.simulator.cluster.migration_source import Migrations
from llumsched.simulator.engines.base import Engine
from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.results.records import RequestStatus
from llumsched.simulator.results.result import SimulationResult
from llumsched.simulator.simulation import simulate
from llumsched.simulator.traces.trace import Trace
from tests.campaigns import examples
from tests.simulator.clusters import REQUEST_COLUMNS, assert_same, clusters

# Random requests may be longer than what a small engine holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*cut short")

SOME = settings(
    max_examples=examples(60),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.slow
@given(clusters())
@SOME
def test_many_steps_at_once_are_the_same_steps(case: tuple[Trace, SimulationOptions]) -> None:
    trace, options = case
    walked = simulate(trace, dataclasses.replace(options, step_by_step=True))
    assert_same(simulate(trace, options), walked)


@pytest.mark.slow
@given(clusters())
@SOME
def test_a_size_looked_up_is_that_of_the_victim_the_policy_chooses(
    case: tuple[Trace, SimulationOptions],
) -> None:
    trace, options = case
    look_up = Migrations.victim_blocks

    def both(migrations: Migrations, source: Engine, now: int) -> int | None:
        found = look_up(migrations, source, now)
        migrations._takes_shortest, before = False, migrations._takes_shortest
        assert found == look_up(migrations, source, now)
        migrations._takes_shortest = before
        return found

    with mock.patch.object(Migrations, "victim_blocks", both):
        simulate(trace, options)


@pytest.mark.slow
@given(clusters())
@SOME
def test_the_same_seed_gives_the_same_bytes(case: tuple[Trace, SimulationOptions]) -> None:
    trace, options = case
    one, other = simulate(trace, options), simulate(trace, options)
    for name in REQUEST_COLUMNS:
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes()
    assert_same(one, other)


@pytest.mark.slow
@given(clusters())
@SOME
def test_a_recorded_simulation_replays_identically(case: tuple[Trace, SimulationOptions]) -> None:
    trace, options = case
    with tempfile.TemporaryDirectory() as folder:
        simulate(trace, dataclasses.replace(options, decision_log=Path(folder)))
        result = replay(Path(folder))
    assert result.num_events >= len(trace)
    assert result.is_identical, result.first_differences


@given(clusters())
@SOME
def test_requests_tokens_and_blocks_are_conserved(case: tuple[Trace, SimulationOptions]) -> None:
    trace, options = case
    cluster = Cluster(trace, options)
    result = cluster.run()
    check_requests(result)
    check_throughput(result)
    # A request may end at its destination before the source has heard that it came.
    open_ends = {
        end
        for m in result.migrations
        if m.outcome == "under way"
        for end in (m.source, m.destination)
    }
    for engine in cluster.engines:
        if engine.is_alive and result.is_complete and engine.instance_id not in open_ends:
            check_blocks(engine)
    timeline = result.timeline
    assert timeline is not None
    total = timeline.num_used_blocks + timeline.num_reserved_blocks + timeline.num_free_blocks
    assert (total == options.effective_kv_blocks).all()
    for column in (timeline.num_used_blocks, timeline.num_reserved_blocks):
        assert (column >= 0).all()
    assert (timeline.num_free_blocks >= 0).all()


def check_requests(result: SimulationResult) -> None:
    """Every request has one end, in the order in which things happen to a request."""
    status = result.status
    assert not (status == RequestStatus.LOST).any()
    if result.is_complete:
        assert not (status == RequestStatus.UNFINISHED).any()
    finished = status == RequestStatus.FINISHED
    assert np.isnan(result.finished_s[~finished]).all()
    order = [
        result.trace.arrival_s,
        result.dispatched_s,
        result.scheduled_s,
        result.first_token_s,
        result.finished_s,
    ]
    for earlier, later in itertools.pairwise(order):
        assert (earlier[finished] <= later[finished] + 1e-12).all()
    produced = result.num_output_tokens
    assert (produced <= result.trace.num_output_tokens).all()
    cut_short = any("cut short" in warning for warning in result.warnings)
    if not cut_short:
        assert (produced[finished] == result.trace.num_output_tokens[finished]).all()
    committed = [
        m.request for m in result.migrations if m.outcome == MigrationOutcome.COMMITTED.value
    ]
    moved = np.bincount(committed, minlength=len(status)) if committed else np.zeros(len(status))
    if result.is_complete and not result.options.failures:
        assert (moved >= result.num_migrations).all()


def check_throughput(result: SimulationResult) -> None:
    """No instance computes tokens faster than its steps allow."""
    coefficients = result.options.hardware.step
    most_per_s = result.options.effective_batched_tokens / (
        coefficients.host_s
        + max(
            coefficients.floor_s,
            coefficients.token_s * result.options.effective_batched_tokens,
        )
    )
    finished = result.status == RequestStatus.FINISHED
    num_tokens = int(result.num_output_tokens[finished].sum())
    assert num_tokens <= most_per_s * result.makespan_s * len(result.instances) + 1


def check_blocks(engine: Engine) -> None:
    """An engine that has nothing to do holds nothing but idle prefix blocks, which are free."""
    assert not engine.running
    assert not engine.waiting
    assert not engine.holding
    assert engine.num_decodes == 0
    assert engine.offset_sum == 0
    assert not any(engine.growth)
    assert engine.num_used == 0
    if engine.cache is not None:
        assert engine.cache.num_in_use == 0
        assert engine.cache.num_idle <= engine.num_blocks
