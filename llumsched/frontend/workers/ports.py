"""Ports at which frontends are reached by instances, also by those that are started later.

Instances are told once where frontends listen. So the ports are chosen before any frontend is
there, and stay theirs while one is being started again: they are bound here, which keeps the system
from giving them to others, but nobody listens here.
"""

from __future__ import annotations

import socket

from vllm.v1.engine.utils import EngineZmqAddresses


class FrontendPorts:
    """Two for each of so many frontends. Use as a context manager: they are free afterwards."""

    def __init__(self, host: str, num_frontends: int) -> None:
        self._host = host
        self._reserved = [(_reserve(host), _reserve(host)) for _ in range(num_frontends)]

    def __enter__(self) -> FrontendPorts:
        return self

    def __exit__(self, *_: object) -> None:
        for pair in self._reserved:
            for reserved in pair:
                reserved.close()

    def of(self, index: int) -> tuple[int, int]:
        """Where a frontend listens, for requests to instances and for their outputs."""
        inputs, outputs = self._reserved[index]
        return inputs.getsockname()[1], outputs.getsockname()[1]

    def addresses(self) -> EngineZmqAddresses:
        """Where instances find all of them."""
        pairs = [self.of(index) for index in range(len(self._reserved))]
        return EngineZmqAddresses(
            inputs=[f"tcp://{self._host}:{port}" for port, _ in pairs],
            outputs=[f"tcp://{self._host}:{port}" for _, port in pairs],
        )


def _reserve(host: str) -> socket.socket:
    reserved = socket.socket()
    # ZMQ sets it as well, and two such sockets may have one port while only one of them listens.
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((host, 0))
    return reserved
