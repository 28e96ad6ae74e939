"""The fake engine, which has to notice what a real one would get wrong silently."""

from __future__ import annotations

import pytest

from llumsched.engine.base import CannotMigrate, FinalState, MigrationEngine, SuspendedRequest
from tests.fake_engine.blocks import BlockContent
from tests.fake_engine.engine import FakeEngine
from tests.fake_engine.request import (
    FakeOutput,
    SentRequest,
    expected_output,
    state_of,
)

PROMPT = (7, 3, 9, 1, 4)
MAX_OUTPUT_TOKENS = 12
EXPECTED = expected_output(PROMPT, MAX_OUTPUT_TOKENS)


def make_engine(*, num_blocks: int = 40, max_steps_in_flight: int = 1) -> FakeEngine:
    return FakeEngine(num_blocks=num_blocks, block_size=2, max_steps_in_flight=max_steps_in_flight)


def step(engine: FakeEngine, num_steps: int = 1) -> list[FakeOutput]:
    outputs: list[FakeOutput] = []
    for _ in range(num_steps):
        while engine.schedule_step():
            pass
        outputs += engine.finish_step()
    return outputs


def tokens(outputs: list[FakeOutput], request_id: str = "r") -> list[int]:
    return [output.token_id for output in outputs if output.request_id == request_id]


def suspend(engine: FakeEngine) -> SuspendedRequest:
    suspension = engine.suspend("r")
    while not suspension.done():
        engine.finish_step()
    return suspension.result()


def move(source: FakeEngine, destination: FakeEngine, final: FinalState | None = None) -> None:
    """Move `r` in two stages, with the steps of `source` going on in between."""
    reserved = destination.reserve(source.start_export("r"))
    content: list[BlockContent] = []
    (early,) = source.pin_copyable("r").block_ids
    (place,) = reserved.block_ids
    source.blocks.gather(early[reserved.num_cached_blocks :], content)
    destination.blocks.scatter(place[reserved.num_cached_blocks : len(early)], content)
    suspended = suspend(source)
    (late,) = suspended.blocks.block_ids
    (block_ids,) = destination.grow("r", suspended.blocks.num_tokens)
    num_copied = max(len(early), reserved.num_cached_blocks)
    source.blocks.gather(late[num_copied:], content)
    destination.blocks.scatter(block_ids[num_copied : len(late)], content)
    destination.commit("r", final or suspended.final)
    source.release("r")
    source.check()
    destination.check()


def test_it_is_a_migration_engine() -> None:
    engine: MigrationEngine = make_engine()
    assert isinstance(engine, FakeEngine)


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
def test_undisturbed_output_is_the_expected_one(max_steps_in_flight: int) -> None:
    engine = make_engine(max_steps_in_flight=max_steps_in_flight)
    engine.add_request("r", PROMPT, MAX_OUTPUT_TOKENS)
    outputs = step(engine, 20)
    assert tokens(outputs) == EXPECTED
    assert [output.finished for output in outputs] == [False] * 11 + [True]
    assert engine.pool.num_free_blocks == 40


def test_a_preempted_request_is_computed_again_to_the_same_output() -> None:
    engine = make_engine()
    engine.add_request("r", PROMPT, MAX_OUTPUT_TOKENS)
    before = step(engine, 4)
    engine.preempt("r")
    assert tokens(before + step(engine, 20)) == EXPECTED


def test_requests_that_do_not_fit_together_take_turns() -> None:
    engine = make_engine(num_blocks=10)
    for request_id in ("r", "s"):
        engine.add_request(request_id, PROMPT, MAX_OUTPUT_TOKENS)
    outputs = step(engine, 60)
    assert tokens(outputs, "r") == tokens(outputs, "s") == EXPECTED
    engine.check()


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
def test_a_moved_request_goes_on_as_if_it_had_not(max_steps_in_flight: int) -> None:
    source = make_engine(max_steps_in_flight=max_steps_in_flight)
    destination = make_engine(max_steps_in_flight=max_steps_in_flight)
    source.add_request("r", PROMPT, MAX_OUTPUT_TOKENS)
    outputs = step(source, 3)
    move(source, destination)
    done = len(outputs)
    outputs += step(destination, 20)
    # With a second step in flight at the suspension, its output came out during the move.
    assert tokens(outputs) == EXPECTED[:done] + EXPECTED[done + max_steps_in_flight - 1 :]
    assert source.pool.num_free_blocks == destination.pool.num_free_blocks == 40


def test_a_destination_that_has_the_prefix_is_sent_the_rest() -> None:
    source, destination = make_engine(), make_engine()
    for engine in (source, destination):
        engine.add_request("r", PROMPT, MAX_OUTPUT_TOKENS)
        step(engine, 3)
    destination.abort("r")
    assert destination.reserve(source.start_export("r")).num_cached_blocks == 3
    destination.cancel("r")
    source.resume("r")
    move(source, destination)
    assert tokens(step(destination, 20)) == EXPECTED[3:]


# Negative: what is left behind shows.


def test_a_block_that_is_not_copied_shows() -> None:
    source, destination = make_engine(), make_engine()
    source.add_request("r", PROMPT, MAX_OUTPUT_TOKENS)
    step(source, 3)
    destination.reserve(source.start_export("r"))
    destination.commit("r", suspend(source).final)
    with pytest.raises(AssertionError, match="was never written"):
        step(destination)


def test_a_block_that_is_copied_while_it_is_written_shows() -> None:
    source, destination = make_engine(), make_engine()
    source.add_request("r", PROMPT, MAX_OUTPUT_TOKENS)
    step(source, 2)  # six positions are computed; the next is in the fourth block
    reserved = destination.reserve(source.start_export("r"))
    content: list[BlockContent] = []
    held = source.requests["r"].block_ids
    source.schedule_step()
    source.blocks.gather(held[:4], content)
    destination.blocks.scatter(destination.grow("r", 8)[0][:4], content)
    source.finish_step()
    assert reserved.num_cached_blocks == 0
    destination.commit("r", suspend(source).final)
    with pytest.raises(AssertionError, match="was never written"):
        step(destination)


def test_a_generator_that_is_left_behind_shows() -> None:
    source, destination = make_engine(), make_engine()
    source.add_request("r", PROMPT, MAX_OUTPUT_TOKENS)
    step(source, 3)
    final = FinalState(output_token_ids=EXPECTED[:3], num_computed_tokens=7, generator_state=b"1")
    move(source, destination, final)
    assert tokens(step(destination, 20)) != EXPECTED[3:]


def test_a_pinned_block_survives_its_request() -> None:
    engine = make_engine(num_blocks=8)
    engine.add_request("r", PROMPT, MAX_OUTPUT_TOKENS)
    step(engine, 2)
    engine.start_export("r")
    (pinned,) = engine.pin_copyable("r").block_ids
    engine.abort("r")
    engine.add_request("s", (1, 2, 3, 4, 5, 6), 3)
    step(engine)
    assert not set(pinned) & set(engine.requests["s"].block_ids)
    engine.release("r")
    engine.check()


def test_writing_into_a_shared_block_is_an_error() -> None:
    engine = make_engine()
    engine.add_request("r", PROMPT, MAX_OUTPUT_TOKENS)
    step(engine, 2)
    with pytest.raises(AssertionError, match="cached prefix"):
        engine.blocks.scatter(engine.requests["r"].block_ids[:1], [(0, 0)])


# What ends an export or forbids it.


@pytest.mark.parametrize(
    ("what", "lose"),
    [
        ("aborted", lambda engine: engine.abort("r")),
        ("preempted", lambda engine: engine.preempt("r")),
        ("finished", lambda engine: step(engine, 20)),
    ],
)
def test_the_loss_of_an_exported_request_is_told_once(what: str, lose: object) -> None:
    engine = make_engine()
    lost: list[tuple[str, str]] = []
    engine.on_lost = lambda request_id, how: lost.append((request_id, how))
    engine.add_request("r", PROMPT, MAX_OUTPUT_TOKENS)
    step(engine, 2)
    engine.start_export("r")
    assert callable(lose)
    lose(engine)
    assert lost == [("r", what)]
    assert isinstance(engine.suspend("r").exception(), CannotMigrate)
    engine.resume("r")
    step(engine, 20)
    assert engine.pool.num_free_blocks == 40


def test_a_suspended_request_that_is_aborted_is_gone() -> None:
    engine = make_engine(max_steps_in_flight=2)
    engine.add_request("r", PROMPT, MAX_OUTPUT_TOKENS)
    step(engine, 2)
    engine.schedule_step()
    engine.start_export("r")
    suspension = engine.suspend("r")
    assert not suspension.done()
    assert engine.is_suspended("r")
    engine.abort("r")
    assert isinstance(suspension.exception(), CannotMigrate)
    engine.resume("r")
    engine.finish_step()
    assert engine.pool.num_free_blocks == 40


def test_a_resumed_request_goes_on() -> None:
    engine = make_engine()
    engine.add_request("r", PROMPT, MAX_OUTPUT_TOKENS)
    outputs = step(engine, 3)
    engine.start_export("r")
    suspend(engine)
    assert step(engine) == []
    engine.resume("r")
    assert tokens(outputs + step(engine, 20)) == EXPECTED


def test_reasons_not_to_migrate() -> None:
    source, destination = make_engine(), make_engine(num_blocks=2)
    with pytest.raises(CannotMigrate, match="not decoding"):
        source.start_export("r")
    source.add_request("r", PROMPT, MAX_OUTPUT_TOKENS)
    with pytest.raises(CannotMigrate, match="not decoding"):
        source.start_export("r")
    step(source)
    state = source.start_export("r")
    with pytest.raises(CannotMigrate, match="already"):
        source.start_export("r")
    with pytest.raises(CannotMigrate, match="of this id"):
        source.reserve(state)
    with pytest.raises(CannotMigrate, match="no room"):
        destination.reserve(state)
    small = state_of(
        SentRequest(request_id="r", prompt_token_ids=(1,), max_output_tokens=9),
        (2,),
        placement_number=1,
    )
    destination.reserve(small)
    with pytest.raises(CannotMigrate, match="of this id"):
        destination.reserve(small)
    with pytest.raises(CannotMigrate, match="ran out"):
        destination.grow("r", 1000)
    destination.cancel("r")
    with pytest.raises(CannotMigrate, match="gone"):
        destination.grow("r", 3)
    assert destination.pool.num_free_blocks == 2
