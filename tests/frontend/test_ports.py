"""The ports of a frontend are its own, also while it is being started again."""

from __future__ import annotations

import socket

import pytest

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
