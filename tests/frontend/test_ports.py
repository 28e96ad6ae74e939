"""The ports of a frontend are its own, also while it is being started again."""

from __future__ import annotations

import errno
import socket

import pytest

from llumsched.frontend import server
from llumsched.frontend.options.arguments import parse
from llumsched.frontend.routing.sockets import FrontendSockets
from llumsched.frontend.workers.ports import FrontendPorts
from llumsched.wire.keys import PoolKeys

HOST = "127.0.0.1"


def test_one_frontend_after_the_other_listens_where_instances_were_told() -> None:
    keys = PoolKeys.generate()
    with FrontendPorts(HOST, 2) as ports:
        addresses = ports.addresses()
        assert len({*addresses.inputs, *addresses.outputs}) == 4
        for _ in range(2):
            sockets = FrontendSockets(HOST, keys, 1 << 20, ports.of(1))
            found = sockets.addresses()
            sockets.close()
            assert (found.inputs, found.outputs) == (addresses.inputs[1:], addresses.outputs[1:])


def test_nobody_else_gets_them_meanwhile() -> None:
    with FrontendPorts(HOST, 1) as ports:
        port, _ = ports.of(0)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((HOST, port))
    with socket.socket() as other:
        other.bind((HOST, port))


def port_in_time_wait() -> int:
    """A port of which one connection, ended by its server, is still in the state TIME_WAIT."""
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        with socket.create_connection((HOST, port)) as client:
            accepted, _ = listener.accept()
            # Whoever closes first has the connection in that state.
            accepted.close()
            assert client.recv(1) == b""
    with socket.socket() as plain, pytest.raises(OSError, match="in use") as raised:
        plain.bind((HOST, port))
    assert raised.value.errno == errno.EADDRINUSE
    return port


def test_a_server_starts_again_while_connections_of_the_last_one_are_in_time_wait() -> None:
    port = port_in_time_wait()
    args, _ = parse(["some/model", f"--port={port}"])
    address, listening = server.bind(args)
    with listening:
        listening.listen()
        assert address == f"http://{HOST}:{port}"


def test_so_does_a_frontend_behind_it() -> None:
    port, other = port_in_time_wait(), port_in_time_wait()
    sockets = FrontendSockets(HOST, PoolKeys.generate(), 1 << 20, (port, other))
    found = sockets.addresses()
    sockets.close()
    assert [*found.inputs, *found.outputs] == [f"tcp://{HOST}:{port}", f"tcp://{HOST}:{other}"]
