"""Whole messages, both ways, between a launcher and a frontend that it has started.

A pair of connected sockets has no address: nobody else can speak there. The end of either process
is the end of the channel.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from multiprocessing.connection import Connection
from typing import Protocol

# Where processes that count together keep their counts: `prometheus_client` looks there.
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"


class ChannelClosed(Exception):
    """The other end is gone, or does not read."""


class ChannelEnd(Protocol):
    """One end of a channel, whatever carries it."""

    def send(self, payload: bytes) -> None: ...

    def receive(self) -> bytes: ...

    def close(self) -> None: ...


class Channel:
    """One end. Any thread may send; one receives.

    Args:
        send_timeout_s: an end that reads nothing for so long is as good as gone.
    """

    def __init__(self, end: socket.socket, send_timeout_s: float = 5.0) -> None:
        seconds, rest = divmod(send_timeout_s, 1.0)
        timeout = struct.pack("ll", int(seconds), int(rest * 1_000_000))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        # Shutting a socket down wakes a thread that reads from it; closing its descriptor does not.
        self._socket = socket.socket(fileno=os.dup(end.fileno()))
        self._connection = Connection(end.detach())
        self._sending = threading.Lock()

    def send(self, payload: bytes) -> None:
        """Send one message.

        Raises:
            ChannelClosed: and nothing more can be sent.
        """
        try:
            with self._sending:
                self._connection.send_bytes(payload)
        except OSError as error:
            self.close()
            raise ChannelClosed(str(error)) from error

    def receive(self) -> bytes:
        """The next message.

        Raises:
            ChannelClosed: at the end.
        """
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise ChannelClosed(str(error) or "the other end is closed") from error

    def close(self) -> None:
        """Wake up whoever receives, at both ends; safe to call twice."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
