"""Two frontends share two instances: whatever happens to one concerns its own clients alone."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.campaigns import THOROUGH
from tests.chaos.faults import POLL_INTERVAL_S, SERVING_TIMEOUT_S, FaultyPool
from tests.chaos.load import CASES, Progress, References, stream_through
from tests.e2e.cases import COMPLETIONS, completion
from tests.e2e.client import Chunk, Whole, belongs, differences, in_parallel
from tests.e2e.moving import Mover
from tests.e2e.servers import llumsched

pytestmark = pytest.mark.skipif(not THOROUGH, reason="a server of its own, and things that die")

BEGUN = 6
FRONTENDS = {"frontend-0", "frontend-1"}
# Of each stream here, so that none ends while things happen.
NUM_TOKENS = 800
PROMPTS = ("The sea", "Once upon a time", "The first rule", "In winter")


class SharedPool(FaultyPool):
    """A pool with several frontends."""

    def frontend_of(self, request_id: str) -> str:
        """The frontend whose client an answer goes to."""
        (found,) = {r["frontend_id"] for r in self.requests() if belongs(r, request_id)}
        return str(found)

    def await_frontends(self) -> None:
        """Wait until each place is taken."""
        deadline_s = time.monotonic() + SERVING_TIMEOUT_S
        while {f["state"] for f in self.frontends().values()} != {"serving"}:
            assert time.monotonic() < deadline_s, f"still not all: {self.frontends()}"
            time.sleep(POLL_INTERVAL_S)

    def num_requests(self) -> int:
        """On all instances, as they report it."""
        loads = self.instances().values()
        return sum(load["num_running"] + load["num_waiting"] for load in loads)

    def num_used_blocks(self) -> int:
        loads = self.instances().values()
        return sum(load["num_total_blocks"] - load["num_free_blocks"] for load in loads)


@pytest.fixture(scope="module")
def server_pool(model: str, log_folder: Path) -> Iterator[SharedPool]:
    """Requests move only when told."""
    flags = ("--instances=2", "--frontends=2", "--policy=round_robin")
    server = llumsched(model, log_folder, *flags, name="frontends")

    def await_boot() -> None:
        server.await_line(", with 2 frontends")

    with SharedPool.until_its_end(server, model, log_folder, await_boot) as pool:
        yield pool


@pytest.fixture
def pool(server_pool: SharedPool) -> Iterator[SharedPool]:
    """Everything is there and at rest; the test must leave it so that it comes to rest."""
    server_pool.await_serving(2)
    server_pool.await_frontends()
    server_pool.await_idle()
    yield server_pool
    server_pool.await_idle()


@pytest.fixture(scope="module")
def references(server_pool: SharedPool) -> References:
    return References.of(server_pool)


@dataclass
class Stream:
    """A long answer to one client."""

    prompt: str
    frontend: str | None = None
    answer: Whole | None = None
    broke: bool = False


class Streams:
    """Long answers, one for each prompt, each on a connection of its own."""

    def __init__(self, pool: SharedPool) -> None:
        self._pool = pool
        self.streams = [Stream(prompt) for prompt in PROMPTS]
        self.progress = Progress(len(self.streams))

    def run(self, number: int) -> None:
        stream = self.streams[number]

        def count(_number: int, chunk: Chunk) -> None:
            if stream.frontend is None:
                stream.frontend = self._pool.frontend_of(chunk["id"])
            self.progress.count(number)

        try:
            stream.answer = self._pool.whole(COMPLETIONS, long_answer(stream.prompt), count)
        except httpx.TransportError:
            stream.broke = True

    def of(self, frontend: str) -> list[Stream]:
        return [stream for stream in self.streams if stream.frontend == frontend]


def long_answer(prompt: str) -> dict[str, Any]:
    return completion(prompt=prompt, max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS)


def retried(pool: SharedPool) -> Whole:
    """Whatever is sent on a connection to the dead one breaks with it, once."""
    body = completion(prompt="The sea", max_tokens=4)
    with contextlib.suppress(httpx.TransportError):
        return pool.whole(COMPLETIONS, body)
    return pool.whole(COMPLETIONS, body)


def test_requests_of_each_frontend_move_token_exact(
    pool: SharedPool, references: References
) -> None:
    """The order to move lands at either frontend, whosever the request is."""
    names = list(CASES)
    movers = {name: Mover(pool, (2, 12)) for name in names}
    frontends: dict[str, str] = {}
    complaints: list[str] = []

    def stream(name: str) -> None:
        def on_chunk(number: int, chunk: Chunk) -> None:
            if name not in frontends:
                frontends[name] = pool.frontend_of(chunk["id"])
            movers[name](number, chunk)

        answer = pool.whole(*CASES[name], on_chunk)
        complaints.extend(references.complaints(name, answer))

    in_parallel(*(lambda name=name: stream(name) for name in names))
    assert not complaints, "\n".join(complaints)
    assert set(frontends.values()) == FRONTENDS
    for frontend in FRONTENDS:
        moved = [
            answer.status
            for name in names
            if frontends[name] == frontend
            for answer in movers[name].answers
        ]
        assert moved.count(200) >= 2, moved


def test_a_frontend_is_killed(pool: SharedPool) -> None:
    victim, survivor = sorted(FRONTENDS)
    before = pool.frontends()[victim]
    num_ended = pool.metric('llumsched_requests_total{outcome="finished",priority_class="normal"}')
    streams = Streams(pool)

    def fault() -> None:
        streams.progress.when_all_have(BEGUN)
        num_left = len(streams.of(survivor))
        assert 0 < num_left < len(PROMPTS)
        num_blocks = pool.num_used_blocks()
        os.kill(before["pid"], signal.SIGKILL)
        # The client's retry finds the other, and does not wait for anything.
        retry = retried(pool)
        assert retry.text
        pool.server.await_that(lambda: pool.num_requests() == num_left, "its requests have ended")
        assert all(stream.answer is None for stream in streams.of(survivor)), "they go on"
        assert pool.num_used_blocks() < num_blocks, "and their blocks are free"
        assert {r["frontend_id"] for r in pool.requests()} == {survivor}

    in_parallel(*(lambda n=n: streams.run(n) for n in range(len(PROMPTS))), fault)
    assert all(stream.broke for stream in streams.of(victim))
    for stream in streams.of(survivor):
        assert stream.answer is not None
        expected = pool.whole(COMPLETIONS, long_answer(stream.prompt))
        assert not differences(stream.answer.as_dict(), expected.as_dict())

    pool.await_frontends()
    after = pool.frontends()[victim]
    assert after["pid"] != before["pid"]
    assert after["num_deaths"] == before["num_deaths"] + 1
    assert "SIGKILL" in after["last_failure"]
    # What was counted before it died is still counted.
    assert (
        pool.metric('llumsched_requests_total{outcome="finished",priority_class="normal"}')
        > num_ended
    )


def test_the_one_that_came_back_serves_as_the_other(
    pool: SharedPool, references: References
) -> None:
    """Requests of the frontend that came back move, and go on when an instance dies."""
    deaths = [status["num_deaths"] for status in pool.frontends().values()]
    assert any(deaths), "one was killed before"
    frontends: set[str] = set()

    def fault(progress: Progress) -> None:
        progress.when_all_have(BEGUN)
        frontends.update(r["frontend_id"] for r in pool.requests())
        pool.signal(pool.running()[0], signal.SIGKILL)

    assert stream_through(pool, references, fault) > 0
    assert frontends == FRONTENDS


def test_operators_reach_the_whole_pool_by_any_frontend(
    pool: SharedPool, references: References
) -> None:
    """An instance is replaced, and the scheduler dies meanwhile."""
    leaving = pool.running()[0]

    def fault(progress: Progress) -> None:
        progress.when_all_have(BEGUN)
        answer = pool.drain(leaving, replace=True)
        assert answer.status == 202, answer
        pool.kill_scheduler()

    assert stream_through(pool, references, fault) > 0
    pool.server.await_that(lambda: leaving not in pool.running(), f"{leaving} has ended")
    pool.await_serving(2)
    assert pool.post("/llumsched/scale", {"num_instances": 2}).status == 202


def test_both_frontends_are_killed(pool: SharedPool) -> None:
    """The port stays open: who comes meanwhile waits for the first that is back."""
    for frontend in pool.frontends().values():
        os.kill(frontend["pid"], signal.SIGKILL)
    answers: list[str] = []

    def ask() -> None:
        answers.append(retried(pool).text)

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join(SERVING_TIMEOUT_S)
    assert answers
    pool.await_frontends()
