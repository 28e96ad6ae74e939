"""Freeness is Algorithm 1 of Llumnix, read as it is printed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumsched.core.load import Headroom, InstanceLoad
from llumsched.core.types import PriorityClass
from tests.core.builders import TOTAL_BLOCKS, make_load
from tests.core.freeness import Unreported, freeness, virtual_usage

NO_HEADROOM = Headroom(target_load=1.0)


@dataclass
class Request:
    """A request as Algorithm 1 sees it."""

    num_blocks: int
    priority: int = PriorityClass.NORMAL
    is_queuing: bool = False
    is_head_of_line: bool = False
    is_fake: bool = False


def algorithm_1(requests: list[Request], *, m: int, headroom: dict[int, float]) -> float:
    """`CalcFreeness` with `CalcVirtualUsage` and `GetHeadroom`, line by line."""

    def get_headroom(priority: int) -> float:
        num_requests = sum(r.priority == priority for r in requests if not r.is_queuing)
        return headroom[priority] / num_requests

    def virtual_usage_of(request: Request) -> float:
        if request.is_queuing:
            return request.num_blocks if request.is_head_of_line else 0
        if request.is_fake:
            return math.inf
        return request.num_blocks + get_headroom(request.priority)

    if not requests:
        return math.inf
    batch_size = max(1, sum(not r.is_queuing and not r.is_fake for r in requests))
    return (m - sum(virtual_usage_of(r) for r in requests)) / batch_size


def load_of(requests: list[Request]) -> InstanceLoad:
    running = [r for r in requests if not r.is_queuing]
    waiting = [r for r in requests if r.is_queuing]
    by_class = Counter(r.priority for r in running)
    return make_load(
        num_used_blocks=sum(r.num_blocks for r in running),
        num_running=len(running),
        num_waiting=len(waiting),
        head_of_line_blocks=waiting[0].num_blocks if waiting else 0,
        num_waiting_blocks=sum(r.num_blocks for r in waiting),
        num_running_by_class=tuple(sorted(by_class.items())),
    )


blocks = st.integers(1, 40)
running = st.lists(st.builds(Request, num_blocks=blocks, priority=st.sampled_from(PriorityClass)))
queue = st.lists(st.builds(Request, num_blocks=blocks, is_queuing=st.just(True)))


@given(running=running, queue=queue, target_load=st.floats(0, 1), draining=st.booleans())
def test_freeness_equals_algorithm_1(
    running: list[Request], queue: list[Request], target_load: float, draining: bool
) -> None:
    if queue:
        queue[0].is_head_of_line = True
    fake = [Request(num_blocks=0, is_fake=True)] if draining else []
    expected = algorithm_1(
        running + queue + fake,
        m=TOTAL_BLOCKS,
        headroom={
            PriorityClass.LOW: 0.0,
            PriorityClass.NORMAL: 0.0,
            PriorityClass.HIGH: TOTAL_BLOCKS * (1 - target_load),
        },
    )
    got = freeness(
        load_of(running + queue), headroom=Headroom(target_load=target_load), draining=draining
    )
    assert got == pytest.approx(expected)


@given(running=running, sent=running)
def test_what_was_sent_counts_as_running(running: list[Request], sent: list[Request]) -> None:
    unreported = Unreported(
        num_requests=len(sent),
        num_blocks=sum(r.num_blocks for r in sent),
        num_high=sum(r.priority == PriorityClass.HIGH for r in sent),
    )
    headroom = Headroom()
    overlaid = freeness(load_of(running), headroom=headroom, unreported=unreported)
    assert overlaid == pytest.approx(freeness(load_of(running + sent), headroom=headroom))


def test_an_empty_instance_is_infinitely_free() -> None:
    assert freeness(make_load(), headroom=NO_HEADROOM) == math.inf


def test_blocks_reserved_for_an_incoming_migration_count_as_used() -> None:
    load = make_load(num_used_blocks=10, num_running=0, num_reserved_blocks=10)
    assert freeness(load, headroom=NO_HEADROOM) == TOTAL_BLOCKS - 10


def test_an_incoming_migration_counts_in_the_batch_as_its_blocks_count_in_the_usage() -> None:
    # Else an instance with one request and one arriving looks twice as free as it is, and takes
    # more than it can keep: the requests then move back and forth.
    arriving = make_load(num_used_blocks=20, num_running=1, num_migrations_in=1)
    arrived = make_load(num_used_blocks=20, num_running=2)
    assert freeness(arriving, headroom=Headroom()) == freeness(arrived, headroom=Headroom())


def test_a_stuck_prompt_makes_an_instance_look_full() -> None:
    load = make_load(num_used_blocks=60, num_waiting=3, head_of_line_blocks=50)
    assert freeness(load, headroom=NO_HEADROOM) == TOTAL_BLOCKS - 60 - 50


def test_high_priority_claims_its_headroom_once() -> None:
    load = make_load(num_used_blocks=10, num_running=2, num_running_by_class=((1, 2),))
    assert virtual_usage(load, headroom=Headroom(target_load=0.2)) == pytest.approx(10 + 80)
