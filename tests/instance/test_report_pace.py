"""How often an instance reports, without a clock and without an engine."""

from __future__ import annotations

from typing import Any

import pytest

from llumsched.core.load import InstanceLoad
from llumsched.instance.report_pace import IDLE_REPORT_INTERVAL_S, REPORT_INTERVAL_S, ReportPace


class Stage:
    """A pace, and a clock that only the test moves."""

    def __init__(self, idle_interval_s: float = IDLE_REPORT_INTERVAL_S) -> None:
        self.now_s = 0.0
        self.pace = ReportPace(idle_interval_s, lambda: self.now_s)

    def reports_in(self, seconds: float, **load: Any) -> int:
        """Reports of an instance that is never woken, in so many seconds."""
        until_s = self.now_s + seconds
        num_reports = 0
        while self.now_s < until_s:
            self.pace.read(load_of(**load))
            num_reports += 1
            self.now_s += self.pace.pause_s
        return num_reports


def load_of(**changes: Any) -> InstanceLoad:
    values: dict[str, Any] = {
        "instance_id": "a",
        "sequence": 1,
        "num_total_blocks": 100,
        "num_free_blocks": 100,
    }
    return InstanceLoad(**(values | changes))


def test_an_idle_instance_says_once_a_second_that_it_lives() -> None:
    assert Stage().reports_in(60.0) == pytest.approx(60 / IDLE_REPORT_INTERVAL_S, abs=1)
    assert Stage(idle_interval_s=0.3).reports_in(60.0) == pytest.approx(200, abs=1)


@pytest.mark.parametrize(
    "load",
    [
        {"num_running": 1},
        {"num_waiting": 1},
        {"num_migrations_in": 1},
        {"num_migrations_out": 1},
        {"num_reserved_blocks": 1},
        {"received_request_ids": ("a",)},
        {"finished_request_ids": ("a",)},
    ],
    ids=lambda load: next(iter(load)),
)
def test_one_that_is_not_idle_reports_ten_times_a_second(load: dict[str, Any]) -> None:
    stage = Stage()
    assert stage.reports_in(60.0, **load) == pytest.approx(60 / REPORT_INTERVAL_S, abs=1)
    assert not stage.pace.stepped(), "a step is no news by itself"


def test_the_first_step_after_an_idle_time_is_reported() -> None:
    stage = Stage()
    stage.reports_in(5.0)
    assert stage.pace.stepped()
    stage.pace.read(load_of(num_running=1))
    assert not stage.pace.stepped()


def test_whoever_hears_of_a_migration_reports_for_a_while_as_if_it_had_begun() -> None:
    stage = Stage()
    stage.reports_in(5.0)
    rested = stage.pace.rests
    stage.pace.migrates()
    assert (rested, stage.pace.rests) == (True, False)
    assert stage.reports_in(0.5) == pytest.approx(0.5 / REPORT_INTERVAL_S, abs=1)
    assert stage.reports_in(60.0) < 61 + 1 / REPORT_INTERVAL_S
