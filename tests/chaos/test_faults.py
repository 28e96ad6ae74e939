"""Whatever happens to a pool, a stream that has begun is finished, exactly once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable

import httpx
import pytest

from tests.campaigns import THOROUGH
from tests.chaos.faults import FaultyPool
from tests.chaos.load import CASES, LONG, NAMES, Load, Progress, References, stream_through
from tests.e2e.moving import move

# All have begun, and none is near its end.
BEGUN = 6

thorough = pytest.mark.skipif(
    not THOROUGH, reason="every instance that is lost takes its time to be replaced"
)


def test_an_instance_is_killed(pool: FaultyPool, references: References) -> None:
    victim = pool.running()[0]

    def fault(progress: Progress) -> None:
        progress.when_all_have(BEGUN)
        pool.signal(victim, signal.SIGKILL)

    assert stream_through(pool, references, fault) > 0
    pool.await_serving(2)
    assert victim not in pool.running(), "another took its place, with another name"
    assert "llumsched_resumptions_total" in pool.text("/metrics")


@thorough
def test_an_instance_is_stopped(pool: FaultyPool, references: References) -> None:
    """A stopped process keeps its connections, and would go on if it were let."""
    victim = pool.running()[-1]

    def fault(progress: Progress) -> None:
        progress.when_all_have(BEGUN)
        pool.signal(victim, signal.SIGSTOP)

    assert stream_through(pool, references, fault) > 0


@thorough
@pytest.mark.parametrize("harm", [FaultyPool.hang_loop, FaultyPool.break_connections])
def test_an_instance_is_harmed_while_its_process_lives(
    pool: FaultyPool, references: References, harm: Callable[[FaultyPool, str], None]
) -> None:
    """ZMQ would connect again, and say nothing of the tokens that were on their way."""
    victim = pool.running()[-1]

    def fault(progress: Progress) -> None:
        progress.when_all_have(BEGUN)
        harm(pool, victim)

    assert stream_through(pool, references, fault) > 0
    pool.server.await_that(lambda: victim not in pool.running(), "it was noticed")


@thorough
@pytest.mark.parametrize("party", ["source", "destination", "scheduler"])
def test_a_party_to_a_migration_is_killed(
    pool: FaultyPool, references: References, party: str
) -> None:
    """Every request of one instance is on its way to the other when one of the three dies."""
    source, destination = pool.running()

    def fault(progress: Progress) -> None:
        progress.when_all_have(BEGUN)
        moving = [r["request_id"] for r in pool.requests() if r["instance_id"] == source]

        def move_quietly(request_id: str) -> None:
            with contextlib.suppress(AssertionError):
                move(pool, request_id, destination)

        threads = [threading.Thread(target=move_quietly, args=(i,)) for i in moving]
        for thread in threads:
            thread.start()
        pool.server.await_that(
            lambda: any(r["num_moves"] for r in pool.requests()), "one has moved"
        )
        if party == "scheduler":
            pool.kill_scheduler()
        else:
            pool.signal(source if party == "source" else destination, signal.SIGKILL)
        for thread in threads:
            thread.join()

    assert stream_through(pool, references, fault) > 0


def test_the_scheduler_is_killed(pool: FaultyPool, references: References) -> None:
    def fault(progress: Progress) -> None:
        progress.when_all_have(BEGUN)
        before = pool.serving()
        pool.kill_scheduler()
        killed_s = time.monotonic()
        # Requests are taken while there is none.
        assert pool.whole("/v1/completions", {"prompt": "The sea", "max_tokens": 4}).text
        age_s = pool.await_rebuilt(before)
        outage_s = time.monotonic() - killed_s
        sys.stdout.write(
            f"its view was whole {age_s:.2f} s after it was up, {outage_s:.1f} s after the kill\n"
        )
        # It knows what runs, though nobody has asked it to place it.
        request_id = next(r["request_id"] for r in pool.requests() if r["num_output_tokens"])
        answer = pool.migrate(request_id)
        assert answer.status in (200, 404, 409), answer

    # The others may be over by then.
    assert stream_through(pool, references, fault, (*NAMES, LONG)) > 0


def test_the_only_frontend_is_killed(pool: FaultyPool, references: References) -> None:
    """All requests end; another takes its place at the same port and over the instances."""
    (before,) = pool.frontends().values()
    with (
        contextlib.suppress(httpx.TransportError),
        pool.stream(*CASES[LONG]) as chunks,
    ):
        next(chunks)
        os.kill(before["pid"], signal.SIGKILL)
        for _ in chunks:
            pass
    pool.server.await_that(lambda: answers(pool), "another frontend answers")
    (after,) = pool.frontends().values()
    assert after["frontend_id"] == before["frontend_id"]
    assert after["pid"] != before["pid"]
    assert after["num_deaths"] == before["num_deaths"] + 1
    assert "SIGKILL" in after["last_failure"]
    pool.await_idle()
    assert not references.complaints("seeded", pool.whole(*CASES["seeded"]))


def answers(pool: FaultyPool) -> bool:
    """True if a request is answered; while no frontend is there, connections wait or break."""
    try:
        return bool(pool.whole("/v1/completions", {"prompt": "The sea", "max_tokens": 1}))
    except httpx.TransportError:
        return False


@thorough
def test_a_scheduler_that_hangs_is_started_again(pool: FaultyPool, references: References) -> None:
    """The scheduler keeps its port and its connections, and answers nobody."""

    def fault(progress: Progress) -> None:
        progress.when_all_have(BEGUN)
        before, (hung,) = pool.serving(), pool.scheduler_pids()
        os.kill(hung, signal.SIGSTOP)
        # Requests are taken meanwhile.
        assert pool.whole("/v1/completions", {"prompt": "The sea", "max_tokens": 4}).text
        pool.server.await_that(lambda: hung not in pool.scheduler_pids(), "it was noticed")
        pool.await_rebuilt(before)

    assert stream_through(pool, references, fault) > 0


@thorough
def test_scheduler_and_instance_are_killed_together(
    pool: FaultyPool, references: References
) -> None:
    victim = pool.running()[0]

    def fault(progress: Progress) -> None:
        progress.when_all_have(BEGUN)
        pid = pool.pid(victim)
        pool.kill_scheduler()
        os.kill(pid, signal.SIGKILL)

    assert stream_through(pool, references, fault) > 0


@thorough
def test_a_rolling_restart_under_load(pool: FaultyPool, references: References) -> None:
    before = pool.running()
    load = Load(pool, references, num_clients=4, seed=1)
    try:
        for instance_id in before:
            assert pool.drain(instance_id, replace=True).status == 202
            pool.server.await_that(
                lambda gone=instance_id: gone not in pool.running(),  # type: ignore[misc]
                f"{instance_id} has ended",
            )
            pool.await_serving(2)
    finally:
        load.stop()
    assert not load.complaints, load.complaints
    assert load.num_streams > 0
    assert not set(before) & set(pool.running())


@thorough
def test_an_instance_whose_machine_goes_is_emptied_first(
    pool: FaultyPool, references: References
) -> None:
    """All requests migrate: none is computed again, as those of a dead one are."""
    victim = pool.running()[0]
    num_lost, num_resumptions, num_moves = lost_resumed_moved(pool)

    def fault(progress: Progress) -> None:
        progress.when_all_have(BEGUN)
        leaving = [r["request_id"] for r in pool.requests() if r["instance_id"] == victim]
        assert leaving
        pool.signal(victim, signal.SIGTERM)
        pool.server.await_that(lambda: victim not in pool.running(), "it has left")

    assert stream_through(pool, references, fault, names=(LONG,) * 4) > 0
    lost, resumptions, moves = lost_resumed_moved(pool)
    assert (lost, resumptions) == (num_lost, num_resumptions)
    assert moves > num_moves
    pool.await_serving(2)
    assert victim not in pool.running(), "another has taken its place"


def lost_resumed_moved(pool: FaultyPool) -> tuple[float, float, float]:
    """Instances that have died, and how often requests were resumed and have moved."""
    names = ("lost_instances", "resumptions", "moves")
    lost, resumptions, moves = (pool.metric(f"llumsched_{name}_total") for name in names)
    return lost, resumptions, moves


@thorough
def test_scaled_by_hand(pool: FaultyPool, references: References) -> None:
    assert pool.post("/llumsched/scale", {"num_instances": 1}).status == 202
    stream_through(pool, references, lambda _: None)
    pool.server.await_that(lambda: len(pool.running()) == 1, "one has left")
    assert pool.post("/llumsched/scale", {"num_instances": 2}).status == 202
    stream_through(pool, references, lambda _: None)
    pool.await_serving(2)
    assert pool.post("/llumsched/scale", {"num_instances": 99}).status == 409


@thorough
def test_a_seeded_storm(pool: FaultyPool, references: References) -> None:
    """Faults of random kinds at random moments, under load."""
    rng = random.Random(20)
    load = Load(pool, references, num_clients=4, seed=20)
    try:
        for _ in range(2):
            time.sleep(rng.uniform(0.5, 2.0))
            rng.choice(FAULTS)(pool, rng)
    finally:
        load.stop()
    assert not load.complaints, load.complaints
    assert load.num_streams > 0


def kill(pool: FaultyPool, rng: random.Random) -> None:
    pool.signal(rng.choice(pool.running()), signal.SIGKILL)


def stop(pool: FaultyPool, rng: random.Random) -> None:
    pool.signal(rng.choice(pool.running()), signal.SIGSTOP)


def drain(pool: FaultyPool, rng: random.Random) -> None:
    running = pool.running()
    if len(running) > 1:
        pool.drain(rng.choice(running), replace=True)


def kill_scheduler(pool: FaultyPool, _: random.Random) -> None:
    with contextlib.suppress(AssertionError):  # it is being started
        pool.kill_scheduler()


def hang(pool: FaultyPool, rng: random.Random) -> None:
    pool.hang_loop(rng.choice(pool.running()))


def disconnect(pool: FaultyPool, rng: random.Random) -> None:
    pool.break_connections(rng.choice(pool.running()))


FAULTS: tuple[Callable[[FaultyPool, random.Random], None], ...] = (
    kill,
    stop,
    hang,
    disconnect,
    drain,
    kill_scheduler,
)
