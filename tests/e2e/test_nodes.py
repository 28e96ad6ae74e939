"""Instances on several nodes of a Ray cluster, one that waits for a node to be added, and a
frontend that joins."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.campaigns import THOROUGH
from tests.chaos.faults import FaultyPool
from tests.chaos.test_faults import lost_resumed_moved
from tests.e2e.cases import COMPLETIONS, SINGLE, completion
from tests.e2e.client import Chunk, Whole, belongs, differences, in_parallel
from tests.e2e.moving import Mover
from tests.e2e.nodes import Nodes, address_of
from tests.e2e.servers import API_KEY, Server, llumsched

GREEDY = completion(max_tokens=160)
# Not near its end when Ray has been told, which takes seconds.
LONG = completion(max_tokens=900)
# Only what drains is emptied; else requests stay where the tests have put them.
CONFIG = """
policy: round_robin
parts:
  migration:
    name: freeness_pairs
    source_below: 0
    destination_above: 0
"""


@dataclass
class Spread:
    """A pool whose instances have a node each."""

    nodes: Nodes
    pool: FaultyPool

    def machines(self) -> dict[str, str]:
        """Where each instance runs."""
        return {b["instance_id"]: b["node"] for b in self.pool.berths() if b["state"] == "running"}


@pytest.fixture(scope="module")
def spread(model: str, log_folder: Path) -> Iterator[Spread]:
    """There is room for one instance on each node."""
    config = log_folder / "spread.yaml"
    config.write_text(CONFIG)
    with Nodes(log_folder) as nodes:
        for _ in range(2):
            nodes.add(num_cpus=1)
        server = llumsched(
            model,
            log_folder,
            "--instances=2",
            "--any-node",
            f"--ray-address={nodes.address}",
            f"--config={config}",
            "--max-num-seqs=16",
            name="spread",
            VLLM_API_KEY=API_KEY,
            **nodes.environment,
        )
        boots = server.await_health
        with FaultyPool.until_its_end(server, model, log_folder, boots, API_KEY) as pool:
            yield Spread(nodes, pool)


@pytest.fixture(scope="module")
def undisturbed(spread: Spread) -> Whole:
    return spread.pool.whole(COMPLETIONS, GREEDY)


def test_each_is_on_a_node_of_its_own_and_listens_there(spread: Spread) -> None:
    assert sorted(spread.machines().values()) == [address_of(0), address_of(1)]
    for instance_id, ip in spread.machines().items():
        process = psutil.Process(spread.pool.pid(instance_id))
        peers = [c.laddr for c in process.net_connections("tcp") if c.status == "LISTEN"]
        assert any(address.ip == ip for address in peers), peers


@pytest.mark.parametrize("name", ["penalties, seeded"])
def test_there_and_back_again(spread: Spread, name: str) -> None:
    expected = spread.pool.whole(*SINGLE[name])
    mover = Mover(spread.pool, at=(2, 12))
    found = spread.pool.whole(*SINGLE[name], on_chunk=mover)
    assert len(mover.reports) == 2
    assert not differences(found.as_dict(), expected.as_dict())


class Fault:
    """Befalls the instance of another machine once a request streams there."""

    def __init__(self, spread: Spread) -> None:
        self._spread = spread
        (self.victim,) = (i for i, ip in spread.machines().items() if ip != address_of(0))
        self._num_chunks = 0

    def __call__(self, _number: int, _chunk: Chunk) -> None:
        self._num_chunks += 1
        if self._num_chunks == 8:
            pool = self._spread.pool
            (request,) = pool.requests()
            if request["instance_id"] != self.victim:
                assert pool.migrate(request["request_id"], self.victim).status == 200
            self.befall()

    def befall(self) -> None:
        raise NotImplementedError


class Signalled(Fault):
    def __init__(self, spread: Spread, number: signal.Signals) -> None:
        super().__init__(spread)
        self._number = number

    def befall(self) -> None:
        self._spread.pool.signal(self.victim, self._number)


class Goes(Fault):
    """The machine of the instance is about to go, and does when nothing runs there."""

    def befall(self) -> None:
        self._spread.nodes.drain(address_of(1))
        self._spread.pool.server.await_that(
            lambda: self.victim not in self._spread.machines(), "it is emptied"
        )


@pytest.mark.parametrize("number", [signal.SIGSTOP, *([signal.SIGKILL] if THOROUGH else [])])
def test_an_instance_of_another_machine_dies(
    spread: Spread, undisturbed: Whole, number: signal.Signals
) -> None:
    """The stream goes on, the instance is ended there, and another takes its place."""
    spread.pool.await_serving(2)
    fault = Signalled(spread, number)
    pid = spread.pool.pid(fault.victim)
    found = spread.pool.whole(COMPLETIONS, GREEDY, on_chunk=fault)
    assert not differences(found.as_dict(), undisturbed.as_dict())
    spread.pool.server.await_that(lambda: not psutil.pid_exists(pid), "it has ended")
    spread.pool.await_serving(2)
    assert fault.victim not in spread.machines()


@pytest.mark.skipif(not THOROUGH, reason="an instance takes its time to boot")
def test_one_that_finds_no_room_waits_for_a_machine(spread: Spread, undisturbed: Whole) -> None:
    """Ray's autoscaler adds a machine for what waits; here the test does."""
    spread.pool.await_serving(2)
    assert spread.pool.post("/llumsched/scale", {"num_instances": 3}).status == 202
    spread.pool.server.await_that(
        lambda: any(b["state"] == "booting" for b in spread.pool.berths()), "one waits"
    )
    ip = spread.nodes.add(num_cpus=1)
    spread.pool.await_serving(3)
    assert ip in spread.machines().values()
    assert not differences(spread.pool.whole(COMPLETIONS, GREEDY).as_dict(), undisturbed.as_dict())
    spread.nodes.end(2)
    spread.pool.server.await_that(
        lambda: ip not in spread.machines().values(), "its end was noticed"
    )
    assert spread.pool.whole(COMPLETIONS, GREEDY).choices == undisturbed.choices


@pytest.mark.skipif(not THOROUGH, reason="an instance takes its time to boot")
def test_a_machine_that_goes_is_emptied_first(spread: Spread) -> None:
    """The machine's request migrates, none is computed again; then nothing keeps the machine."""
    pool = spread.pool
    pool.await_serving(2)
    undisturbed = pool.whole(COMPLETIONS, LONG)
    before = lost_resumed_moved(pool)
    goes = Goes(spread)
    found = pool.whole(COMPLETIONS, LONG, on_chunk=goes)
    assert not differences(found.as_dict(), undisturbed.as_dict())
    pool.server.await_that(lambda: goes.victim not in spread.machines(), "it has left")
    lost, resumptions, moves = lost_resumed_moved(pool)
    assert (lost, resumptions) == before[:2]
    assert moves > before[2]
    pool.server.await_that(lambda: not spread.nodes.runs(1), "Ray has let the machine go")
    ip = spread.nodes.add(num_cpus=1)
    pool.await_serving(2)
    assert ip in spread.machines().values(), "another has taken its place"


# ---- a frontend that joins -----------------------------------------------------------------------

# Of each stream during which something dies.
DURING = completion(max_tokens=500, min_tokens=500)
BEGUN = 6
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def joined(spread: Spread, model: str, log_folder: Path) -> Iterator[FaultyPool]:
    """The same pool, by a frontend that another has started. It has no key but the pool's."""
    arguments = ["llumsched", "frontend", f"--join={spread.nodes.address}"]
    server = Server("joined", arguments, log_folder, spread.nodes.environment)
    boots = server.await_health
    with FaultyPool.until_its_end(server, model, log_folder, boots, API_KEY) as pool:
        yield pool


def frontend_of(pool: FaultyPool, answer_id: str) -> str:
    (found,) = {r["frontend_id"] for r in pool.requests() if belongs(r, answer_id)}
    return str(found)


def streams_while(fault: Callable[[], None], *pools: FaultyPool) -> list[Whole | None]:
    """A long answer by each of these, and what befalls them once all have begun; ``None`` for a
    stream that broke."""
    answers: list[Whole | None] = [None] * len(pools)
    begun = [threading.Event() for _ in pools]

    def stream(number: int) -> None:
        def on_chunk(count: int, _: Chunk) -> None:
            if count == BEGUN:
                begun[number].set()

        with contextlib.suppress(httpx.TransportError):
            answers[number] = pools[number].whole(COMPLETIONS, DURING, on_chunk)

    def befall() -> None:
        for event in begun:
            assert event.wait(TIMEOUT_S)
        fault()

    in_parallel(*(lambda n=n: stream(n) for n in range(len(pools))), befall)
    return answers


def test_a_frontend_joins(spread: Spread, joined: FaultyPool, undisturbed: Whole) -> None:
    """A request of it moves there and back; both frontends tell of the whole pool, to whoever has
    the pool's key."""
    assert httpx.get(f"{joined.server.url}/v1/models").status_code == 401
    spread.pool.await_serving(2)
    mover = Mover(joined, at=(2, 12))
    frontends: set[str] = set()

    def on_chunk(number: int, chunk: Chunk) -> None:
        if number == 1:
            frontends.update(frontend_of(pool, chunk["id"]) for pool in (joined, spread.pool))
        mover(number, chunk)

    found = joined.whole(COMPLETIONS, GREEDY, on_chunk)
    assert len(mover.reports) == 2
    assert not differences(found.as_dict(), undisturbed.as_dict())
    assert frontends == {"frontend-1"}
    for pool in (joined, spread.pool):
        pool.server.await_that(
            lambda pool=pool: (  # type: ignore[misc]
                {name: f["state"] for name, f in pool.frontends().items()}
                == {"frontend-0": "serving", "frontend-1": "serving"}
            ),
            "both are listed",
        )


@pytest.mark.skipif(not THOROUGH, reason="another has to boot in its place")
def test_the_first_frontend_is_killed_beside_one_that_joined(
    spread: Spread, joined: FaultyPool
) -> None:
    spread.pool.await_serving(2)
    pid = joined.frontends()["frontend-0"]["pid"]
    lost, kept = streams_while(lambda: os.kill(pid, signal.SIGKILL), spread.pool, joined)
    assert lost is None
    assert kept is not None
    assert not differences(kept.as_dict(), joined.whole(COMPLETIONS, DURING).as_dict())
    joined.await_idle()


@pytest.mark.skipif(not THOROUGH, reason="an instance takes its time to boot")
def test_a_machine_is_lost_beside_a_frontend_that_joined(
    spread: Spread, joined: FaultyPool
) -> None:
    """Streams of all frontends go on where the other instance is."""
    spread.pool.await_serving(2)
    (ip,) = (ip for ip in spread.machines().values() if ip != address_of(0))
    number = next(n for n in range(8) if address_of(n) == ip)
    found = streams_while(lambda: spread.nodes.end(number), joined, spread.pool)
    expected = joined.whole(COMPLETIONS, DURING)
    for answer in found:
        assert answer is not None
        assert not differences(answer.as_dict(), expected.as_dict())
    spread.nodes.add(num_cpus=1)
    spread.pool.await_serving(2)


def test_a_frontend_that_joined_is_killed(spread: Spread, joined: FaultyPool) -> None:
    """The request of that one ends everywhere, that of the other goes on."""
    pool = spread.pool
    pool.await_serving(2)

    def num_requests() -> int:
        return sum(i["num_running"] + i["num_waiting"] for i in pool.instances().values())

    def fault() -> None:
        pool.server.await_that(lambda: num_requests() == 2, "both run")
        os.kill(joined.server.pid, signal.SIGKILL)
        pool.server.await_that(lambda: num_requests() == 1, "its request has ended")
        assert [r["frontend_id"] for r in pool.requests()] == ["frontend-0"]

    lost, kept = streams_while(fault, joined, pool)
    assert lost is None
    assert kept is not None
    assert not differences(kept.as_dict(), pool.whole(COMPLETIONS, DURING).as_dict())
    pool.server.await_that(lambda: set(pool.frontends()) == {"frontend-0"}, "it is forgotten")
    pool.await_idle()
