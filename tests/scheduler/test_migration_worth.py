"""A migration saved what its source would have lacked, from its end to the request's."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from llumsched.core.actions import StartMigration
from llumsched.core.events import (
    Event,
    InstanceLost,
    LoadReported,
    RequestAborted,
    RequestFinished,
    Ticked,
)
from llumsched.core.load import InstanceLoad
from llumsched.scheduler.migration_worth import MOST_FOLLOWED, MigrationWorth, MigrationWorths
from llumsched.wire.control import MigrationStatistics, ReportMigration


def start(migration_id: str = "m1", request_id: str | None = None) -> StartMigration:
    return StartMigration(
        migration_id=migration_id,
        source="a",
        destination="b",
        request_id=request_id,
        reason="",
        expected_win_s=2.0,
    )


def report(migration_id: str = "m1", request_id: str = "r", source: str = "a") -> ReportMigration:
    return ReportMigration(
        migration_id=migration_id,
        request_id=request_id,
        source=source,
        destination="b",
        outcome="committed",
        reason="",
        statistics=MigrationStatistics(
            num_stages=2,
            num_blocks=10,
            num_cached_blocks=0,
            num_bytes=10,
            num_tokens=320,
            num_output_tokens=20,
            total_s=0.3,
            suspended_s=0.02,
            step_time_s=0.1,
            transport="tcp",
        ),
    )


def load(free: int, instance_id: str = "a") -> LoadReported:
    return LoadReported(
        load=InstanceLoad(
            instance_id=instance_id, sequence=1, num_total_blocks=64, num_free_blocks=free
        )
    )


def moved() -> MigrationWorths:
    worths = MigrationWorths()
    told(worths.handled(Ticked(), (start(),), 0.0))
    assert told(worths.migration_ended(report(), 10.0)) == []
    return worths


def told(worths: Iterable[MigrationWorth]) -> list[float]:
    return [worth.won_s for worth in worths]


def follow(worths: MigrationWorths, *events: tuple[float, Event]) -> list[MigrationWorth]:
    return [worth for now_s, event in events for worth in worths.handled(event, (), now_s)]


ENDS = RequestFinished(request_id="r", num_output_tokens=50)


def test_as_long_as_the_source_has_less_than_the_request_fills() -> None:
    found = follow(moved(), (10.5, load(20)), (11.0, load(4)), (11.5, load(40)), (12.0, ENDS))
    assert found == [
        MigrationWorth(migration_id="m1", request_id="r", source="a", won_s=0.5, expected_s=2.0)
    ]


def test_the_request_grows_as_if_it_had_stayed() -> None:
    """Ten blocks of 32 are free all the time; with a token a step of 0.1 s they are too few."""
    at_first = follow(moved(), (10.05, load(11)), (10.1, ENDS))
    later = follow(moved(), *((10.0 + n, load(11)) for n in range(1, 6)), (15.0, ENDS))
    assert [w.won_s for w in at_first] == [0.0]
    assert [w.won_s for w in later] == [2.0]


def test_other_instances_say_nothing_of_the_source() -> None:
    assert told(follow(moved(), (11.0, load(0, "b")), (12.0, ENDS))) == [0.0]


@pytest.mark.parametrize(
    "end", [RequestAborted(request_id="r"), InstanceLost(instance_id="a", reason="it died")]
)
def test_it_is_told_once_whatever_ends_it(end: Event) -> None:
    worths = moved()
    assert len(follow(worths, (11.0, end), (12.0, end), (13.0, ENDS))) == 1


def test_the_next_move_ends_the_first() -> None:
    worths = moved()
    told(worths.handled(Ticked(), (start("m2"),), 11.0))
    assert [w.migration_id for w in worths.migration_ended(report("m2", source="b"), 12.0)] == [
        "m1"
    ]
    assert [w.migration_id for w in follow(worths, (13.0, ENDS))] == ["m2"]


def test_nothing_is_expected_of_what_an_operator_asked_for() -> None:
    worths = MigrationWorths()
    told(worths.migration_ended(report(), 10.0))
    assert [w.expected_s for w in follow(worths, (11.0, ENDS))] == [None]


def test_silence_counts_for_a_second_at_most() -> None:
    assert told(follow(moved(), (100.0, load(0)), (101.0, ENDS))) == [1.0]


def test_what_is_followed_is_bounded() -> None:
    worths = MigrationWorths()
    num_told = 0
    for number in range(MOST_FOLLOWED + 5):
        told(worths.handled(Ticked(), (start(f"m{number}"),), 0.0))
        num_told += len(told(worths.migration_ended(report(f"m{number}", f"r{number}"), 1.0)))
    assert num_told == 5
