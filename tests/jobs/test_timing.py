"""When jobs are due: cron to the second, time zones, windows, and times that were missed."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumsched.jobs.spec import Job, SpecError, load, parse
from llumsched.jobs.timing import decide, is_in_window, next_due

HTTP = {"url": "http://127.0.0.1:1/"}


def job(name: str = "j", **fields: Any) -> Job:
    return parse({"name": name, "http": HTTP, **({} if "after" in fields else DAILY), **fields})


DAILY = {"cron": "0 0 22 * * *"}
A_AT_ONE = "{name: a, http: {url: 'http://x'}, cron: '0 1 * * *'}"
C_AFTER_BOTH = "{name: c, http: {url: 'http://x'}, after: [a, b]}"


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def shown(time: float | None) -> str:
    assert time is not None
    return datetime.fromtimestamp(time, UTC).strftime("%a %m-%d %H:%M:%S")


@pytest.mark.parametrize(
    ("cron", "expected"),
    [
        ("*/15 * * * * *", "Fri 01-01 10:00:15"),
        ("30 5 11 * * *", "Fri 01-01 11:05:30"),
        ("5 11 * * *", "Fri 01-01 11:05:00"),
        ("0 0 9 ? * 1-5", "Mon 01-04 09:00:00"),
        ("0 0 9 * * 0", "Sun 01-03 09:00:00"),
        ("0 0 9 * * 7", "Sun 01-03 09:00:00"),
        ("0 0 9 * * fri-sun", "Sat 01-02 09:00:00"),
        ("0 0 9 L * ?", "Sun 01-31 09:00:00"),
    ],
)
def test_cron_is_read_as_crontab_and_quartz_write_it(cron: str, expected: str) -> None:
    assert shown(next_due(job(cron=cron), at("2027-01-01T10:00:00"))) == expected


def test_a_time_zone_counts_also_where_its_clocks_change() -> None:
    berlin = job(cron="0 30 2 * * *", timezone="Europe/Berlin")
    assert shown(next_due(berlin, at("2027-01-01T10:00:00"))) == "Sat 01-02 01:30:00"
    assert shown(next_due(berlin, at("2027-07-01T10:00:00"))) == "Fri 07-02 00:30:00"


def test_one_shot_times_come_once() -> None:
    once = job(cron=None, at=["2027-01-02T03:00:00", "2027-01-01T01:00:00+01:00"])
    first = next_due(once, at("2026-12-31T00:00:00"))
    assert shown(first) == "Fri 01-01 00:00:00"
    second = next_due(once, first or 0.0)
    assert shown(second) == "Sat 01-02 03:00:00"
    assert next_due(once, second or 0.0) is None


@pytest.mark.parametrize(
    ("misfire", "expected"),
    [
        ("once", ["Mon 01-04 22:00:00"]),
        ("skip", []),
        ("all", ["Sat 01-02 22:00:00", "Sun 01-03 22:00:00", "Mon 01-04 22:00:00"]),
    ],
)
def test_times_that_were_missed_are_made_up_for_as_the_job_says(
    misfire: str, expected: list[str]
) -> None:
    begin, now = at("2027-01-01T23:00:00"), at("2027-01-05T10:00:00")
    assert list(map(shown, decide(job(misfire=misfire), begin, now))) == expected


@pytest.mark.parametrize("misfire", ["once", "skip"])
def test_a_time_that_has_just_come_is_not_missed(misfire: str) -> None:
    begin, now = at("2027-01-01T23:00:00"), at("2027-01-03T22:00:30")
    assert list(map(shown, decide(job(misfire=misfire), begin, now))) == ["Sun 01-03 22:00:00"]


@given(
    steps=st.lists(st.integers(1, 400), min_size=1, max_size=20),
    misfire=st.sampled_from(["once", "all", "skip"]),
)
def test_no_time_is_decided_twice_and_all_are_with_all(steps: list[int], misfire: str) -> None:
    every = job(cron="*/20 * * * * *", misfire=misfire)
    begin = time = at("2027-01-01T00:00:05")
    found: list[float] = []
    for step in steps:
        found += decide(every, time, time + step)
        time += step
    assert found == sorted(set(found))
    due = [t for t in range(int(begin), int(time) + 1) if t % 20 == 0]
    assert set(found) <= set(map(float, due))
    if misfire == "all":
        assert found == list(map(float, due))


def test_a_window_may_go_over_midnight() -> None:
    night = job(window={"from": "22:00", "to": "06:00"})
    day = job(window={"from": "08:00", "to": "18:30"}, timezone="Europe/Berlin")
    times = ["2027-01-01T21:59:00", "2027-01-01T22:00:00", "2027-01-02T05:59:00"]
    assert [is_in_window(night, at(time)) for time in times] == [False, True, True]
    times = ["2027-01-01T06:59:00", "2027-01-01T07:00:00", "2027-01-01T17:30:00"]
    assert [is_in_window(day, at(time)) for time in times] == [False, True, False]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cron": "* * *"}, "six fields"),
        ({"cron": "61 * * * * *"}, "61"),
        ({"cron": "0 0 0 * * 8"}, "day of the week"),
        ({"cron": None}, "one of cron, at and after"),
        ({"at": ["2027-01-01"]}, "one of cron, at and after"),
        ({"cron": None, "at": ["soon"]}, "soon"),
        ({"timezone": "Mars/Olympus"}, "Mars"),
        ({"window": {"from": "22:00", "to": "22:00"}}, "empty"),
        ({"window": {"from": "25:00", "to": "22:00"}}, "25:00"),
        ({"scale": {"instances": 2}}, "one of http, scale and batch"),
        ({"shards": []}, "shards"),
        ({"shards": ["a", "a"]}, "same key"),
        ({"misfire": "maybe"}, "maybe"),
        ({"colour": "red"}, "colour"),
        ({"name": "a b"}, "name"),
    ],
)
def test_a_mistake_in_a_job_names_the_job_and_the_fix(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        job(**fields)


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        ("{name: a, http: {url: 'http://x'}, after: [b]}", "no job 'b'"),
        (
            ", ".join(
                f"{{name: {a}, http: {{url: 'http://x'}}, after: [{b}]}}" for a, b in ("ab", "ba")
            ),
            "one another",
        ),
        ("{name: a, http: {url: 'http://x'}, cron: '* * * * *'}, " * 2, "this name"),
        (
            ", ".join(
                [A_AT_ONE, "{name: b, http: {url: 'http://x'}, cron: '0 2 * * *'}", C_AFTER_BOTH]
            ),
            "different times",
        ),
        ("3", "object"),
    ],
)
def test_jobs_that_do_not_fit_together_are_named_with_their_file(
    tmp_path: Path, jobs: str, said: str
) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(f"jobs: [{jobs}]\n", encoding="utf-8")
    with pytest.raises(SpecError, match=said) as raised:
        load(path)
    assert "jobs.yaml" in str(raised.value)
