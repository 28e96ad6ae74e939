"""``llumsched top``, its keys pressed, over recorded frames and over a stream."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("textual")

from textual.widgets import Static

from llumsched import cli
from llumsched.commands import CommandError
from llumsched.commands._admin import AdminClient
from llumsched.commands._top_app import TopApp, events, summary, usage
from tests.commands.stub import serving

TIMEOUT_S = 30.0


def instance(instance_id: str, free: int, **changes: Any) -> dict[str, Any]:
    values = {
        "id": instance_id,
        "state": "serving",
        "role": "mixed",
        "freeness": 2.0,
        "report_age_s": 0.1,
        "cannot_migrate": "",
        "total": 100,
        "free": free,
        "reserved": 0,
        "running": 3,
        "waiting": 0,
        "step_s": 0.02,
    }
    return values | changes


def request(request_id: str, instance_id: str | None, **changes: Any) -> dict[str, Any]:
    values = {
        "id": request_id,
        "external_id": request_id,
        "frontend": "frontend-0",
        "instance": instance_id,
        "prompt": 100,
        "outputs": 10,
        "moves": 0,
        "resumptions": 0,
        "class": "normal",
    }
    return values | changes


def frame(at_s: float, **changes: Any) -> dict[str, Any]:
    values = {
        "policy": "adaptive",
        "at_s": at_s,
        "wall_s": at_s,
        "error": "",
        "instances": [instance("instance-0", 5), instance("instance-1", 80)],
        "requests": [request("cmpl-1", "instance-0"), request("cmpl-2", "instance-0", outputs=90)],
        "queued": {"normal": 2},
        "migrations": {"committed": 1},
        "num_tokens_passed": int(100 * at_s),
        "ttft_p50_s": 0.1,
        "ttft_p99_s": 0.9,
    }
    return values | changes


FIRST = frame(1.0)
SECOND = frame(
    2.0,
    instances=[instance("instance-0", 5, state="draining"), instance("instance-2", 100)],
    requests=[
        request("cmpl-1", "instance-1", moves=1, outputs=12, **{"class": "low"}),
        request("cmpl-2", "instance-0", resumptions=1, outputs=90),
    ],
)


class Recorded:
    """Frames that were recorded, and what is asked meanwhile."""

    def __init__(self, *frames: dict[str, Any]) -> None:
        self._frames = frames
        self.ends = threading.Event()
        self.asked: list[tuple[str, ...]] = []

    def live(self) -> Iterator[dict[str, Any]]:
        yield from self._frames
        self.ends.wait(TIMEOUT_S)

    def migrate(self, request_id: str, destination: str | None = None) -> dict[str, Any]:
        self.asked.append(("migrate", request_id))
        return {}

    def drain(self, instance_id: str) -> dict[str, Any]:
        self.asked.append(("drain", instance_id))
        raise CommandError(f"Not drained: {instance_id} is the last.")


def played(pool: Recorded, play: Callable[[TopApp, Any], Any]) -> None:
    async def run() -> None:
        app = TopApp(pool, retry_s=0.01)
        async with asyncio.timeout(TIMEOUT_S), app.run_test(size=(120, 40)) as pilot:
            try:
                await until(pilot, lambda: app._before is not None)
                await play(app, pilot)
            finally:
                pool.ends.set()

    asyncio.run(run())


async def until(pilot: Any, holds: Callable[[], bool]) -> None:
    while not holds():
        await pilot.pause(0.01)


def said(app: TopApp) -> str:
    return "\n".join(strip.text for strip in app.log_of_events.lines)


def shown(app: TopApp, table: str) -> list[str]:
    """The first column of a table, from its top."""
    found: Any = app.query_one(f"#{table}")
    return [str(found.get_row_at(number)[0]) for number in range(found.row_count)]


def test_two_tables_a_summary_and_what_moved() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        await until(pilot, lambda: "is gone" in said(app))
        assert shown(app, "instances") == ["instance-0", "instance-2"]
        assert shown(app, "requests") == ["cmpl-2", "cmpl-1"]
        assert "100 tokens/s" in str(app.query_one("#summary", Static).render())
        assert "cmpl-1 moved: instance-0 → instance-1 after 12 tokens" in said(app)
        assert [app.requests.get_row_at(row)[-1] for row in (0, 1)] == ["normal", "low"]

    played(Recorded(FIRST, SECOND), play)


def test_nothing_is_cut_off() -> None:
    """Columns are as wide as what is in them from the first picture on, and long sentences wrap."""
    sentence = "no " * 60 + "server"

    async def play(app: TopApp, pilot: Any) -> None:
        for _ in range(2):  # as it is drawn, and as it is drawn again by a key
            for table in (app.instances, app.requests):
                for number, column in enumerate(table.columns.values()):
                    cells = [str(row[number]) for row in map(table.get_row_at, range(2))]
                    assert column.width >= max(map(len, cells))
                    assert not column.auto_width
            await pilot.press("s")
        app.say(sentence)
        await until(pilot, lambda: "server" in said(app))
        assert " ".join(said(app).split()).endswith(sentence)

    played(Recorded(FIRST), play)


def test_sorted_by_the_next_column_and_the_other_way_round() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        await pilot.press("r")
        assert shown(app, "instances") == ["instance-1", "instance-0"]
        await pilot.press("s", "s")  # by the share of KV blocks in use
        assert shown(app, "instances") == ["instance-0", "instance-1"]
        await pilot.press("tab", "r")  # the requests, by tokens of output
        assert shown(app, "requests") == ["cmpl-1", "cmpl-2"]

    played(Recorded(FIRST), play)


def test_an_instance_is_drained_only_when_that_is_confirmed() -> None:
    pool = Recorded(FIRST)

    async def play(app: TopApp, pilot: Any) -> None:
        await pilot.press("down", "d", "n")
        assert pool.asked == []
        await pilot.press("d", "y")
        await until(pilot, lambda: "instance-1 is the last" in said(app))
        assert pool.asked == [("drain", "instance-1")]

    played(pool, play)


def test_the_request_under_the_cursor_is_moved() -> None:
    pool = Recorded(FIRST)

    async def play(app: TopApp, pilot: Any) -> None:
        await pilot.press("tab", "down", "m")
        await until(pilot, lambda: bool(pool.asked))
        assert pool.asked == [("migrate", "cmpl-1")]

    played(pool, play)


def test_a_server_that_is_away_is_said_and_asked_again() -> None:
    class Away(Recorded):
        num_tried = 0

        def live(self) -> Iterator[dict[str, Any]]:
            self.num_tried += 1
            if self.num_tried == 2:
                raise CommandError("no server at http://127.0.0.1:8000")
            yield FIRST
            if self.num_tried > 2:
                self.ends.wait(TIMEOUT_S)

    async def play(app: TopApp, pilot: Any) -> None:
        await until(pilot, lambda: "no server at" in said(app))

    played(Away(), play)


def test_nothing_has_happened_before_the_first_frame() -> None:
    assert events(FIRST, None) == []
    assert events(FIRST, FIRST) == []
    assert "tokens/s" not in summary(FIRST, None)
    assert usage(instance("i", 0, total=0)) == 0.0


def test_what_the_server_says_goes_before_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--url", "http://127.0.0.1:9"]) == 1
    assert "no server at http://127.0.0.1:9" in capsys.readouterr().err


def test_the_stream_is_that_of_the_live_page(capsys: pytest.CaptureFixture[str]) -> None:
    stream = b'data: {"at_s": 1}\n\ndata: {"at_s": 2}\n\n'
    with serving({"/llumsched/live": (200, stream)}) as stub:
        frames = AdminClient(stub.url).live()
        assert [next(frames)["at_s"], next(frames)["at_s"]] == [1, 2]
        with pytest.raises(CommandError, match="has ended"):
            next(frames)
        assert cli.main(["top", "--url", stub.url]) == 1
    assert "'top' needs a terminal" in capsys.readouterr().err
