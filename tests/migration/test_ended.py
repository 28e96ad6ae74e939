"""Cached blocks of a request that has ended move, and the next turn finds them there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from llumsched.core.migration.source.events import MigrationState
from llumsched.migration.source import OutgoingMigration
from llumsched.wire.control import OrderMigration, ReportMigration
from tests.migration.answers import seen_by_client
from tests.migration.pool import BLOCK_SIZE, Pool
from tests.migration.test_faults import CHOSEN_STATES, DESTINATION, HURRIED, SOURCE

PROMPT = [(7 * number) % 1000 + 10 for number in range(5 * BLOCK_SIZE + 9)]
MORE = [(11 * number) % 1000 + 10 for number in range(20)]
ANSWER = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1)
AT_REST = "neighbour"


def ask(pool: Pool, name: str, prompt: list[int], at: int, **fields: Any) -> RequestOutput:
    pool.submit(name, prompt, ANSWER, at=at, **fields)
    (output,) = pool.finish(name)
    return output


def first_turn(pool: Pool, **fields: Any) -> tuple[str, list[int], int]:
    """A turn has ended at the source: its id, the next turn's prompt, and its full blocks."""
    answer = pool.submit("turn 1", PROMPT, ANSWER, at=SOURCE, **fields)
    (output,) = pool.finish("turn 1")
    tokens = [*PROMPT, *output.outputs[0].token_ids]
    return answer.sequence_ids[0], tokens + MORE, (len(tokens) - 1) // BLOCK_SIZE


def start(
    pool: Pool, sequence_id: str, to: int = DESTINATION, at: int = SOURCE
) -> Future[ReportMigration]:
    source, destination = pool.instances[at], pool.instances[to]
    pool._num_migrations += 1
    order = OrderMigration(
        migration_id=f"m{pool._num_migrations}",
        destination=destination.name,
        destination_endpoint=destination.migrator.endpoint,
        request_id=sequence_id,
        reason="a test",
        has_ended=True,
    )
    return asyncio.run_coroutine_threadsafe(source.migrator.migrate(order, sequence_id), pool._loop)


def move(pool: Pool, sequence_id: str, **where: int) -> ReportMigration:
    (report,) = pool.until_moved(start(pool, sequence_id, **where))
    return report


def test_the_next_turn_finds_it_and_says_the_same(pool: Pool) -> None:
    sequence_id, prompt, num_blocks = first_turn(pool)
    unmoved = ask(pool, "unmoved", prompt, at=2)
    assert not unmoved.num_cached_tokens
    report = move(pool, sequence_id)
    assert (report.outcome, report.has_ended) == ("committed", True), report
    statistics = report.statistics
    assert statistics is not None
    assert (statistics.num_blocks, statistics.num_tokens) == (num_blocks, num_blocks * BLOCK_SIZE)
    assert not any(instance.num_used_blocks for instance in pool.instances)
    turn = ask(pool, "turn 2", prompt, at=DESTINATION)
    assert turn.num_cached_tokens == num_blocks * BLOCK_SIZE
    assert seen_by_client(turn) == seen_by_client(unmoved)
    assert ask(pool, "at home", prompt, at=SOURCE).num_cached_tokens == num_blocks * BLOCK_SIZE


def test_what_the_destination_has_is_not_copied(pool: Pool) -> None:
    sequence_id, prompt, num_blocks = first_turn(pool)
    ask(pool, "like it", PROMPT, at=DESTINATION)
    report = move(pool, sequence_id)
    assert report.statistics is not None
    assert report.statistics.num_cached_blocks == num_blocks - report.statistics.num_blocks > 0
    again = move(pool, sequence_id)
    assert again.statistics is not None
    assert again.statistics.num_blocks == 0
    turn = ask(pool, "turn 2", prompt, at=DESTINATION)
    assert turn.num_cached_tokens == num_blocks * BLOCK_SIZE


def test_neighbours_notice_nothing(pool: Pool) -> None:
    long_answer = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    alone = {}
    for at in (SOURCE, DESTINATION):
        pool.submit(AT_REST, [*MORE, at + 5], long_answer, at=2)
        (alone[at],) = pool.finish(AT_REST)
    sequence_id, prompt, num_blocks = first_turn(pool)
    for at in (SOURCE, DESTINATION):
        pool.submit(f"{AT_REST} {at}", [*MORE, at + 5], long_answer, at=at)
    pool.until(lambda: all(pool.num_tokens(f"{AT_REST} {at}") > 3 for at in (SOURCE, DESTINATION)))
    assert move(pool, sequence_id).outcome == "committed"
    turn = ask(pool, "turn 2", prompt, at=DESTINATION)
    assert turn.num_cached_tokens == num_blocks * BLOCK_SIZE
    for at in (SOURCE, DESTINATION):
        (output,) = pool.finish(f"{AT_REST} {at}")
        assert seen_by_client(output) == seen_by_client(alone[at])


def test_a_salt_goes_along(pool: Pool) -> None:
    sequence_id, prompt, num_blocks = first_turn(pool, cache_salt="a")
    assert move(pool, sequence_id).outcome == "committed"
    assert not ask(pool, "another's", prompt, at=DESTINATION).num_cached_tokens
    turn = ask(pool, "turn 2", prompt, at=DESTINATION, cache_salt="a")
    assert turn.num_cached_tokens == num_blocks * BLOCK_SIZE


def test_it_moves_on_from_where_it_came(pool: Pool) -> None:
    """The destination never ran a turn of it, and says so; after one it can give it away."""
    sequence_id, prompt, _ = first_turn(pool)
    assert move(pool, sequence_id).outcome == "committed"
    assert move(pool, sequence_id, at=DESTINATION, to=2).cause == "not_here"
    answer = pool.submit("turn 2", prompt, ANSWER, at=DESTINATION)
    (output,) = pool.finish("turn 2")
    assert move(pool, answer.sequence_ids[0], at=DESTINATION, to=2).outcome == "committed"
    tokens = [*prompt, *output.outputs[0].token_ids]
    third = ask(pool, "turn 3", tokens + MORE, at=2)
    assert third.num_cached_tokens == (len(tokens) - 1) // BLOCK_SIZE * BLOCK_SIZE


# ---- refused ------------------------------------------------------------------------------------


def test_what_was_evicted_stays_away(pool: Pool) -> None:
    sequence_id, _, _ = first_turn(pool)
    pool.forget_everything()
    report = move(pool, sequence_id)
    assert (report.outcome, report.cause) == ("refused", "not_here")


def test_what_runs_has_not_ended(pool: Pool) -> None:
    answer = pool.submit("turn 1", PROMPT, ANSWER, at=SOURCE)
    pool.until(lambda: pool.num_tokens("turn 1") > 2)
    report = move(pool, answer.sequence_ids[0])
    assert (report.outcome, report.reason) == ("refused", "the request has not ended")
    pool.finish("turn 1")


@pytest.mark.parametrize("who", [SOURCE, DESTINATION])
def test_without_prefix_caching_there_is_nothing(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, who: int
) -> None:
    sequence_id, _, _ = first_turn(pool)
    manager = pool.instances[who].core.scheduler.kv_cache_manager
    monkeypatch.setattr(manager, "enable_caching", False)
    report = move(pool, sequence_id)
    assert (report.outcome, report.cause) == ("refused", "unsupported_engine")
    assert "prefix caching is off" in report.reason


def test_a_full_destination_takes_nothing(pool: Pool) -> None:
    sequence_id, _, _ = first_turn(pool)
    prompts = [[number + 10] * 980 for number in range(3)]
    for number, prompt in enumerate(prompts):
        pool.submit(f"full {number}", prompt, ANSWER, at=DESTINATION)
    names = [f"full {number}" for number in range(3)]
    pool.until(lambda: all(pool.num_tokens(name) > 0 for name in names))
    report = move(pool, sequence_id)
    assert (report.outcome, report.cause) == ("refused", "no_room")
    pool.finish(*names)


# ---- faults -------------------------------------------------------------------------------------


@pytest.fixture
def hurried(pool: Pool) -> Iterator[Pool]:
    pool.configure(options=HURRIED)
    yield pool
    for instance in pool.instances:
        if instance.hangs:
            pool.restart(instance.index)
    pool.settle()
    pool.configure()


@pytest.mark.parametrize("who", [SOURCE, DESTINATION], ids=["source", "destination"])
@pytest.mark.parametrize("state", CHOSEN_STATES)
def test_an_end_dies(
    hurried: Pool, monkeypatch: pytest.MonkeyPatch, who: int, state: MigrationState
) -> None:
    """The other holds nothing for it, and computes the next turn again."""
    pool = hurried
    sequence_id, prompt, _ = first_turn(pool)
    expected = ask(pool, "unmoved", prompt, at=2)
    real: Callable[[OutgoingMigration, Any], None] = OutgoingMigration.execute

    def execute(self: OutgoingMigration, command: Any) -> None:
        if self.record.state is state:
            pool.instances[who].hangs = True
        real(self, command)

    monkeypatch.setattr(OutgoingMigration, "execute", execute)
    moving = start(pool, sequence_id)
    pool.until(lambda: pool.instances[who].hangs or moving.done())
    assert pool.instances[who].hangs
    pool.kill(who)
    if who == DESTINATION:
        pool.until(moving.done)
        assert moving.result().outcome in ("aborted", "refused")
    survivor = pool.instances[1 - who]
    pool.until(lambda: not survivor.port._imports and not survivor.port._exports)
    moving.cancel()
    assert not survivor.num_used_blocks
    turn = ask(pool, "turn 2", prompt, at=1 - who)
    assert seen_by_client(turn) == seen_by_client(expected)
