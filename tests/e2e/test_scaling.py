"""A pool that scales by itself, through Ray: 0 -> 1 -> 2 -> 1 -> 0 -> 1 instances, and what fails.

Every stream says what the first did, whichever instances came and went meanwhile.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.campaigns import THOROUGH
from tests.chaos.faults import FaultyPool
from tests.e2e.cases import COMPLETIONS, STORY, completion
from tests.e2e.client import REQUEST_TIMEOUT_S, Client, Whole, differences, in_parallel
from tests.e2e.servers import CHECKOUT, Server, llumsched

pytestmark = pytest.mark.skipif(not THOROUGH, reason="each instance takes its time to boot")

CONFIG = """
policy: latency
parts:
  scaling: {name: freeness_range, low: 10, high: 40}
scheduler:
  scaling_interval_s: 0.2
  scale_up_after_s: 0.5
  scale_up_cooldown_s: 1.0
  scale_down_after_s: 3.0
  scale_down_cooldown_s: 1.0
"""
FROM_ZERO = ("--instances=0", "--min-instances=0", "--max-instances=2")
NUM_CLIENTS = 8
SHORT = completion(max_tokens=160)
# Two at the same time take so few blocks that one instance is enough, and long enough to tell.
LONG = completion(max_tokens=480)


@contextmanager
def scaling_server(
    model: str, folder: Path, config: str, name: str, *flags: str
) -> Iterator[Server]:
    path = folder / f"{name}.yaml"
    path.write_text(config)
    flags = (*FROM_ZERO, f"--config={path}", "--max-num-seqs=16", *flags)
    server = llumsched(model, folder, *flags, name=name)
    try:
        server.await_health()
        yield server
    finally:
        ending = server.end()
    assert not ending.killed, f"left after SIGTERM: {ending.killed}\n{server.log()[-4000:]}"


class Callers:
    """Clients that ask for the same again and again; ``complaints`` has what was not the same."""

    def __init__(self, pool: Client, expected: Whole, num_clients: int) -> None:
        self._pool = pool
        self._expected = expected
        self._stopping = threading.Event()
        self.complaints: list[str] = []
        self._threads = [threading.Thread(target=self._call) for _ in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def _call(self) -> None:
        while not self._stopping.is_set():
            try:
                answer = self._pool.whole(COMPLETIONS, SHORT)
                self.complaints += differences(answer.as_dict(), self._expected.as_dict())
            except Exception as error:
                self.complaints.append(repr(error))

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(REQUEST_TIMEOUT_S)
            assert not thread.is_alive(), "a stream does not end"


def test_it_scales_with_its_load_from_zero_and_back(model: str, log_folder: Path) -> None:
    with scaling_server(model, log_folder, CONFIG, "scaling") as server:
        pool = FaultyPool(server, model, log_folder)
        assert_is_empty_and_well(pool)

        # 0 -> 1: held until it is up.
        short = pool.whole(COMPLETIONS, SHORT)
        (first,) = pool.serving()
        long = pool.whole(COMPLETIONS, LONG)

        # 1 -> 2, and no more.
        callers = Callers(pool, short, NUM_CLIENTS)
        try:
            pool.await_serving(2)
            (second,) = set(pool.serving()) - {first}
            server.await_that(
                lambda: any(r["instance_id"] == second for r in pool.requests()),
                "the second instance is given requests",
            )
            assert len(pool.berths()) == 2
        finally:
            callers.stop()
        assert not callers.complaints, callers.complaints

        # 2 -> 1: it is drained of what it runs, and nothing is computed again.
        num_moves = pool.metric("llumsched_moves_total")
        answers: list[Whole] = []
        in_parallel(
            *[lambda: answers.append(pool.whole(COMPLETIONS, LONG))] * 2,
            lambda: server.await_that(lambda: len(pool.berths()) == 1, "one has left"),
        )
        for answer in answers:
            assert not differences(answer.as_dict(), long.as_dict())
        assert pool.metric("llumsched_moves_total") > num_moves
        assert pool.metric("llumsched_lost_instances_total") == 0
        assert pool.metric("llumsched_resumptions_total") == 0

        # 1 -> 0 -> 1.
        server.await_that(lambda: not pool.berths(), "the last has left")
        assert_is_empty_and_well(pool)
        assert not differences(pool.whole(COMPLETIONS, SHORT).as_dict(), short.as_dict())
        assert len(pool.serving()) == 1
        pool.close()


def assert_is_empty_and_well(pool: FaultyPool) -> None:
    """Without an instance every path answers."""
    assert not pool.berths()
    assert httpx.get(f"{pool.server.url}/health").status_code == 200
    assert pool.get("/v1/models").status == 200
    assert 'llumsched_queued_requests{priority_class="normal"} 0.0' in pool.text("/metrics")
    tokens = pool.post("/tokenize", {"model": pool.model, "prompt": STORY})
    assert tokens.status == 200, tokens
    shown = subprocess.run(
        [sys.executable, "-m", "llumsched", "status", "--url", pool.server.url],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "no instance serves" in shown.stdout


def test_if_no_instance_comes_the_client_is_told_why(model: str, log_folder: Path) -> None:
    config = "scheduler: {queue_timeout_s: 3.0}\n"
    too_small = "--num-gpu-blocks-override=2"  # for a single request of the longest kind
    with scaling_server(model, log_folder, config, "no-boot", too_small) as server:
        url, body = f"{server.url}{COMPLETIONS}", {"model": model, "prompt": STORY}
        whole = httpx.post(url, json=body, timeout=REQUEST_TIMEOUT_S)
        streamed = httpx.post(url, json=body | {"stream": True}, timeout=REQUEST_TIMEOUT_S)
    for answer in (whole, streamed):
        assert answer.status_code == 503, answer.text
        assert int(answer.headers["retry-after"]) >= 1
        error = answer.json()["error"]
        assert error["code"] == 503
        assert "queue_timeout_s=3 s" in error["message"]
        assert "none serves, and the last launch failed: " in error["message"]
