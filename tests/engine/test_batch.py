"""The batch that a request leaves, comes back to or joins, in vLLM's scheduler and runner V2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.lora.request import LoRARequest
from vllm.v1.request import RequestStatus

from llumsched.engine.base import CannotMigrate, Refusal
from llumsched.engine.vllm.migration.places import highest_cut
from tests.engine.scheduled import Engine, answer_of, engine_config, move, suspended

MakeEngine = Callable[..., Engine]
PROMPT = [7, 8, 9, 10, 11]
OTHER = [17, 18, 19, 20]
ASYNC = pytest.mark.parametrize("num_in_flight", [1, 2], ids=["", "async"])


@pytest.fixture
def make(tmp_path: Path) -> MakeEngine:
    def make(num_in_flight: int = 1, **flags: Any) -> Engine:
        return Engine(engine_config(tmp_path, **flags), num_in_flight=num_in_flight)

    return make


@ASYNC
def test_nothing_happens(make: MakeEngine, num_in_flight: int) -> None:
    engine = make(num_in_flight)
    engine.submit("a", PROMPT, 12)
    engine.submit("b", list(range(200)), 12)
    engine.finish()
    assert engine.answers["a"] == answer_of(PROMPT, 12)
    assert engine.answers["b"] == answer_of(range(200), 12)


@ASYNC
def test_a_suspended_request_holds_no_slot(make: MakeEngine, num_in_flight: int) -> None:
    """The batch is full, and another waits: for the runner there is a slot fewer than it has."""
    engine = make(num_in_flight)
    for name in ("a", "b", "c"):
        engine.submit(name, [*PROMPT, ord(name)], 12)
    engine.until("a", 2)
    with suspended("a", engine):
        engine.submit("d", OTHER, 12)
        for _ in range(3):
            engine.step()
    engine.finish()
    for name in ("a", "b", "c"):
        assert engine.answers[name] == answer_of([*PROMPT, ord(name)], 12)


@ASYNC
def test_what_is_rolled_back_is_in_the_next_step(make: MakeEngine, num_in_flight: int) -> None:
    """The place in the batch is kept, though others wait for one."""
    engine = make(num_in_flight)
    for name in ("a", "b", "c"):
        engine.submit(name, [*PROMPT, ord(name)], 30)
    engine.until("a", 2)
    with suspended("a", engine):
        for _ in range(3):
            engine.step()
        assert engine.request("c").num_output_tokens == 0
    assert "a" in engine.step()
    engine.finish()
    assert engine.answers["a"] == answer_of([*PROMPT, ord("a")], 30)


@ASYNC
def test_rolled_back_at_once(make: MakeEngine, num_in_flight: int) -> None:
    """A step of it is in flight; another would count tokens twice."""
    engine = make(num_in_flight)
    engine.submit("a", PROMPT, 12)
    engine.submit("b", OTHER, 12)
    engine.until("a", 2)
    with suspended("a", engine):
        pass
    if num_in_flight > 1:
        with pytest.raises(CannotMigrate) as refused:
            engine.port.start_export("a")
        assert refused.value.refusal is Refusal.BEING_MIGRATED
    for _ in range(num_in_flight):
        scheduled = engine.step()
    assert "a" in scheduled
    engine.finish()
    assert engine.answers["a"] == answer_of(PROMPT, 12)


@ASYNC
def test_aborted_while_it_is_rolled_back(make: MakeEngine, num_in_flight: int) -> None:
    engine = make(num_in_flight)
    engine.submit("a", PROMPT, 12)
    engine.submit("b", OTHER, 12)
    engine.until("a", 2)
    with suspended("a", engine):
        pass
    engine.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    engine.finish()
    assert engine.answers["b"] == answer_of(OTHER, 12)
    assert engine.scheduler.max_num_active_reqs == 2


@ASYNC
def test_there_and_back(make: MakeEngine, num_in_flight: int) -> None:
    """The request comes back before the worker has been told that it left."""
    here, there = make(num_in_flight), make(num_in_flight)
    for engine, name in ((here, "a"), (here, "b"), (there, "c")):
        engine.submit(name, [*PROMPT, ord(name)], 30)
    here.until("a", 3)
    there.until("c", 3)
    for number in range(2):
        here.submit(f"d{number}", OTHER, 3)
        move("a", here, there)
        for _ in range(num_in_flight):
            there.step()
        move("a", there, here)
        for _ in range(num_in_flight):
            assert "a" in here.step()
    here.finish()
    there.finish()
    assert here.answers["a"] == answer_of([*PROMPT, ord("a")], 30)


def test_a_full_batch_takes_nothing_in(make: MakeEngine) -> None:
    here, there = make(), make()
    here.submit("a", PROMPT, 30)
    here.until("a", 2)
    for name in ("b", "c"):
        there.submit(name, OTHER, 30)
    there.step()
    num_free = there.num_free_blocks
    with pytest.raises(CannotMigrate, match="its batch of 2 requests is full") as refused:
        there.port.reserve(here.port.start_export("a"))
    assert refused.value.refusal is Refusal.NO_ROOM
    assert there.num_free_blocks == num_free


def test_a_reservation_keeps_a_place(make: MakeEngine) -> None:
    here, there = make(), make()
    here.submit("a", PROMPT, 30)
    here.until("a", 2)
    there.submit("b", OTHER, 30)
    there.step()
    state = here.port.start_export("a")
    there.port.reserve(state)
    there.submit("c", OTHER, 30)
    for _ in range(3):
        assert set(there.step()) == {"b"}
    there.port.cancel("a")
    assert set(there.step()) == {"b", "c"}
    here.port.resume("a")


# ---- adapters -----------------------------------------------------------------------------------


def adapter(number: int) -> LoRARequest:
    return LoRARequest(f"adapter {number}", number, "/nowhere")


LORA = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}


@ASYNC
def test_rolled_back_after_another_adapter_was_admitted(
    make: MakeEngine, num_in_flight: int
) -> None:
    """The request waits for the adapter's turn: the scheduler does not survive one too many."""
    engine = make(num_in_flight, max_num_seqs=3, **LORA)
    engine.submit("a", PROMPT, 12, adapter(1))
    engine.submit("b", OTHER, 12, adapter(2))
    engine.until("a", 2)
    assert not engine.answers["b"]
    with suspended("a", engine):
        for _ in range(3):
            engine.step()
    engine.finish()
    assert engine.answers["a"] == answer_of(PROMPT, 12)
    assert engine.answers["b"] == answer_of(OTHER, 12)


def test_what_waits_for_its_adapter_holds_no_slot(make: MakeEngine) -> None:
    """Others fill the batch meanwhile; to runner V2 it is not there."""
    engine = make(**LORA)
    engine.submit("a", PROMPT, 30, adapter(1))
    for name in ("b", "c"):
        engine.submit(name, OTHER, 12, adapter(2))
    engine.until("a", 2)
    with suspended("a", engine):
        engine.step()
        assert set(engine.step()) == {"b"}
    assert set(engine.step()) == {"b", "c"}
    engine.finish()
    assert engine.answers["a"] == answer_of(PROMPT, 30)


def test_no_room_for_the_adapter(make: MakeEngine) -> None:
    here, there = make(**LORA), make(**LORA)
    here.submit("a", PROMPT, 30, adapter(1))
    here.until("a", 2)
    there.submit("b", OTHER, 5, adapter(2))
    there.step()
    state = here.port.start_export("a")
    with pytest.raises(CannotMigrate, match="1 other adapters"):
        there.port.reserve(state)
    there.finish()
    there.port.reserve(state)
    there.port.cancel("a")
    here.port.resume("a")


# ---- blocks of what has just ended --------------------------------------------------------------


def test_blocks_that_a_step_in_flight_writes_are_given_to_no_arrival(make: MakeEngine) -> None:
    """The request has ended, but the step that was under way then still computes a token of it."""
    here, there = make(2), make(2)
    here.submit("a", list(range(500, 830)), 8)
    here.until("a", 2)
    there.submit("ends", list(range(500)), 30, stop_token_ids=[answer_of(range(500), 3)[-1]])
    there.until("ends", 2)
    written = set(there.runner.blocks["ends"])
    while "ends" in there.scheduler.requests:
        there.step()
    assert there._steps, "a step is in flight"
    assert "ends" in there._steps[0][0].num_scheduled_tokens
    state = here.port.start_export("a")
    num_free = there.num_free_blocks
    try:
        given = set(there.port.reserve(state).block_ids[0])
        assert not given & written
    except CannotMigrate:
        assert num_free < len(written)
    there.port.cancel("a")
    there.step()
    assert there.num_free_blocks == 63
    here.port.resume("a")


def test_nothing_arrives_in_blocks_that_were_reset_under_a_step(make: MakeEngine) -> None:
    """vLLM empties the prefix cache only once every block is free, so none is deferred then."""
    here, there = make(2), make(2)
    here.submit("a", PROMPT, 30)
    here.until("a", 2)
    there.submit("b", OTHER, 30)
    there.until("b", 2)
    there.reset()
    state = here.port.start_export("a")
    with pytest.raises(CannotMigrate, match="still written by steps from before"):
        there.port.reserve(state)
    there.step()
    there.port.reserve(state)
    there.port.cancel("a")
    here.port.resume("a")
    there.finish()
    assert there.answers["b"] == answer_of(OTHER, 30)


@ASYNC
def test_no_block_is_copied_before_it_is_computed(make: MakeEngine, num_in_flight: int) -> None:
    """A preempted request has outputs, but its blocks may be of a step that is in flight."""
    engine = make(num_in_flight)
    prompt = list(range(100))
    engine.submit("a", prompt, 30)
    engine.until("a", 2)
    engine.reset()
    engine.step()
    with pytest.raises(CannotMigrate, match="computed again after a preemption"):
        engine.port.start_export("a")
    engine.until("a", 6)
    with suspended("a", engine):
        engine.step()
    engine.finish()
    assert engine.answers["a"] == answer_of(prompt, 30)


# ---- prompts under way --------------------------------------------------------------------------


def full_of_prompts(make: MakeEngine, num_in_flight: int, **flags: Any) -> Engine:
    """Four prompts are being computed, each for several steps to come."""
    engine = make(num_in_flight, max_num_seqs=8, **flags)
    for number in range(4):
        engine.submit(f"p{number}", [number * 200 + i for i in range(190)], 2)
    for _ in range(2):
        engine.step()
    return engine


@ASYNC
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"long_prefill_token_threshold": 32},
        {"long_prefill_token_threshold": 16, "long_prefill_token_threshold_adaptive": True},
        {"scheduling_policy": "priority"},
    ],
    ids=["", "threshold", "adaptive threshold", "priority"],
)
def test_arrivals_are_in_each_step_from_the_next_on(
    make: MakeEngine, num_in_flight: int, flags: dict[str, Any]
) -> None:
    here = make(num_in_flight, max_num_seqs=8)
    there = full_of_prompts(make, num_in_flight, **flags)
    names = ("a", "b", "c")
    for name in names:
        here.submit(name, [*PROMPT, ord(name)], 30)
    here.until("c", 2)
    for name in names[:2]:
        move(name, here, there)
    num_steps = 0
    while there.request("p3").num_output_tokens == 0:
        scheduled = there.step()
        assert scheduled["a"] == scheduled["b"] == 1
        assert sum(scheduled.values()) <= 64
        # The prompts get what is left, but for what does not divide among them.
        assert flags or num_steps or sum(scheduled.values()) >= 60
        assert there.scheduler.scheduler_config.long_prefill_token_threshold == flags.get(
            "long_prefill_token_threshold", 0
        )
        num_steps += 1
        assert num_steps <= 3 or scheduled["c"] == 1
        if num_steps == 3:
            move("c", here, there)
    assert num_steps > 5
    there.finish()
    for name in names:
        assert there.answers[name] == answer_of([*PROMPT, ord(name)], 30)


@ASYNC
def test_what_is_rolled_back_among_prompts_is_in_the_next_step(
    make: MakeEngine, num_in_flight: int
) -> None:
    engine = make(num_in_flight, max_num_seqs=8)
    engine.submit("a", PROMPT, 30)
    engine.until("a", 2)
    with suspended("a", engine):
        for number in range(4):
            engine.submit(f"p{number}", [number * 200 + i for i in range(190)], 2)
        for _ in range(3):
            engine.step()
    while engine.request("p3").num_output_tokens == 0:
        assert engine.step()["a"] == 1
    engine.finish()
    assert engine.answers["a"] == answer_of(PROMPT, 30)


@ASYNC
def test_arrivals_do_not_wait_for_the_turn_of_prompts(make: MakeEngine, num_in_flight: int) -> None:
    """vLLM 0.33 holds prompts back for ``--prefill-schedule-interval`` steps by itself, those
    before it only where their engine core says so: what has its KV is no prompt."""
    here = make(num_in_flight, max_num_seqs=8)
    there = full_of_prompts(make, num_in_flight, prefill_schedule_interval=1000)
    for name, engine in (("a", here), ("b", there)):
        engine.submit(name, [*PROMPT, ord(name)], 60)
    here.until("a", 2)
    there.until("b", 2)
    for number in range(4, 6):
        there.submit(f"p{number}", [number * 200 + i for i in range(190)], 2)
    there.holds_prompts = True
    assert there.step() == {"b": 1}
    move("a", here, there)
    for _ in range(3):
        assert there.step() == {"a": 1, "b": 1}
    with suspended("a", there):
        for _ in range(3):
            assert there.step() == {"b": 1}
    for _ in range(3):
        assert there.step() == {"a": 1, "b": 1}
    there.holds_prompts = False
    there.finish()
    assert there.answers["a"] == answer_of([*PROMPT, ord("a")], 60)


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(0, 300),
)
def test_the_highest_cut(num_wanted: list[int], num_arrivals: int, spare: int) -> None:
    """vLLM has a token of budget for each place of the batch."""
    budget = len(num_wanted) + num_arrivals + spare
    left = budget - num_arrivals
    cut = highest_cut(num_wanted, left)

    def total(cut: int) -> int:
        return sum(min(num, cut) for num in num_wanted)

    if cut is None:
        assert sum(num_wanted) <= left
    else:
        assert cut >= 1
        assert total(cut) <= left < total(cut + 1)
