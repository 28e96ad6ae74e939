"""Bytes of every kind at every port that the processes of a pool listen on: the pool serves on."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
import psutil
import pytest
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from tests.e2e.cases import COMPLETIONS, completion
from tests.e2e.client import POLL_INTERVAL_S, REQUEST_TIMEOUT_S, Admin, collect, differences
from tests.e2e.moving import Mover
from tests.e2e.servers import Server
from tests.wire import strangers

# How long strangers wait to be hung up on: some listeners of libraries never do.
LINGER_S = 0.1
# A giant of any kind would take gigabytes.
MAX_GROWTH_NUM_BYTES = 256 << 20
# Those whose sockets are ours; the rest of Ray is here as well, and only must not take them along.
OURS = ("ray::SchedulerActor", "ray::Instance", "python")


def listening(server: Server) -> dict[int, str]:
    """Every TCP port that a process of the server listens on, with the name of the process."""
    found = {}
    for pid, name in server.processes().items():
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in psutil.Process(pid).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.port] = name
    return found


def resident(server: Server) -> dict[int, int]:
    """Bytes of memory of each process that is ours."""
    found = {}
    for pid, name in server.processes().items():
        if name.startswith(OURS):
            with contextlib.suppress(psutil.NoSuchProcess):
                found[pid] = psutil.Process(pid).memory_info().rss
    return found


def unproven(pool: Admin) -> dict[str, float]:
    """Connections turned away so far, by process."""
    line = re.compile(r'^llumsched_unproven_connections\{process="(.+)"\} (.+)$', re.MULTILINE)
    return {process: float(count) for process, count in line.findall(pool.text("/metrics"))}


def throw(ports: Iterable[int], message: bytes) -> None:
    """Bytes at every port at once; those that have not hung up in time are hung up on."""
    with contextlib.ExitStack() as stack:
        held = []
        for port in ports:
            with contextlib.suppress(OSError):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), 1.0))
                connection.sendall(message)
                held.append(connection)
        deadline_s = time.monotonic() + LINGER_S
        while held and (left_s := deadline_s - time.monotonic()) > 0:
            for connection in select.select(held, [], [], left_s)[0]:
                if has_hung_up(connection):
                    held.remove(connection)


def has_hung_up(connection: socket.socket) -> bool:
    """True if the other end has ended the connection; what it said is thrown away."""
    try:
        return not connection.recv(1 << 16)
    except OSError:
        return True


@pytest.fixture
def ports(llumsched_server: Server, pool: Admin) -> Iterator[dict[int, str]]:
    found = listening(llumsched_server)
    yield found
    ours = {port for port, name in found.items() if name.startswith(OURS)}
    assert ours <= listening(llumsched_server).keys(), "a listener is gone"


def test_bytes_at_every_port(llumsched_server: Server, pool: Admin, ports: dict[int, str]) -> None:
    memory, before = resident(llumsched_server), unproven(pool)
    body = completion(max_tokens=100)
    with pool.stream(COMPLETIONS, body) as stream:
        chunks = [next(stream)]
        for message in (*strangers.BYTES.values(), *strangers.TRUNCATED.values()):
            throw(ports, message)
        chunks += stream
    (answer,) = collect(chunks).choices.values()
    assert answer["finish_reason"] == "length"
    after = resident(llumsched_server)
    assert after.keys() == memory.keys(), "a process died of it"
    grown = {pid: num_bytes - memory[pid] for pid, num_bytes in after.items()}
    assert max(grown.values()) < MAX_GROWTH_NUM_BYTES, grown
    # Counted where they knocked: at the scheduler, at both migrators, at the frontend's sockets.
    deadline_s = time.monotonic() + REQUEST_TIMEOUT_S
    while True:
        counted = {name: count - before.get(name, 0) for name, count in unproven(pool).items()}
        if counted.keys() >= {"scheduler", "frontend-0", *pool.instances()} and all(
            count >= len(strangers.BYTES) for count in counted.values()
        ):
            break
        assert time.monotonic() < deadline_s, counted
        time.sleep(POLL_INTERVAL_S)
    # And what is the pool's own goes on: a request moves between the instances.
    mover = Mover(pool, at=(2,))
    assert not differences(pool.whole(COMPLETIONS, body, mover).choices, collect(chunks).choices)
    assert len(mover.reports) == 1


def test_ray_wants_its_token(llumsched_server: Server, pool: Admin, ports: dict[int, str]) -> None:
    """Ray runs what it is sent. The token is in the environment of its processes, and nowhere."""
    (port,) = (port for port, name in ports.items() if name == "gcs_server")
    (pid,) = (pid for pid, name in llumsched_server.processes().items() if name == "gcs_server")
    token = psutil.Process(pid).environ()["RAY_AUTH_TOKEN"]
    # Generated, and without types.
    messages: Any = gcs_service_pb2
    services: Any = gcs_service_pb2_grpc

    def ask(**headers: str) -> int:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            nodes = services.NodeInfoGcsServiceStub(channel)
            answer = nodes.GetAllNodeInfo(
                messages.GetAllNodeInfoRequest(),
                metadata=tuple(headers.items()),
                timeout=REQUEST_TIMEOUT_S,
            )
        return len(answer.node_info_list)

    for headers in ({}, {"authorization": f"Bearer {'0' * len(token)}"}):
        with pytest.raises(grpc.RpcError) as refused:
            ask(**headers)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert ask(authorization=f"Bearer {token}") == 1
