"""Whole messages, both ways, between a launcher and a frontend that it has started.

A pair of connected sockets has no address: nobody else can speak there. The end of either process
is the end of the channel.
"""

from __future__ import annotations

import socket
import struct
import threading

# Where processes that count together keep their counts: `prometheus_client` looks there.
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_LENGTH = struct.Struct("!I")


class ChannelClosed(Exception):
    """The other end is gone, or does not read."""


class Channel:
    """One end. Any thread may send; one receives.

    Args:
        send_timeout_s: an end that reads nothing for so long is as good as gone.
    """

    def __init__(self, end: socket.socket, send_timeout_s: float = 5.0) -> None:
        self._socket = end
        seconds, rest = divmod(send_timeout_s, 1.0)
        end.setsockopt(
            socket.SOL_SOCKET,
            socket.SO_SNDTIMEO,
            struct.pack("ll", int(seconds), int(rest * 1_000_000)),
        )
        self._sending = threading.Lock()

    def send(self, payload: bytes) -> None:
        """Send one message.

        Raises:
            ChannelClosed: and nothing more can be sent.
        """
        try:
            with self._sending:
                self._socket.sendall(_LENGTH.pack(len(payload)) + payload)
        except OSError as error:
            self.close()
            raise ChannelClosed(str(error)) from error

    def receive(self) -> bytes:
        """The next message.

        Raises:
            ChannelClosed: at the end.
        """
        (num_bytes,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return self._read(num_bytes)

    def _read(self, num_bytes: int) -> bytes:
        read = bytearray()
        while len(read) < num_bytes:
            try:
                part = self._socket.recv(num_bytes - len(read))
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not part:
                raise ChannelClosed("the other end is closed")
            read += part
        return bytes(read)

    def close(self) -> None:
        """Wake up whoever receives, at both ends; safe to call twice."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is closed already
