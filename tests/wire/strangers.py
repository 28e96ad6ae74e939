"""Strangers that can reach a socket of a pool and do not hold its keys: each kind knocks once.

They speak ZMTP, ZeroMQ's protocol (https://rfc.zeromq.org/spec/23), as far as it serves them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Mapping

import zmq

from llumsched.wire.keys import PoolKeys

PATIENCE_S = 30
SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
LONG_COMMAND = b"\x06"


def greeting(mechanism: bytes) -> bytes:
    """ZMTP 3.1's first 64 bytes."""
    return SIGNATURE + b"\x03\x01" + mechanism.ljust(20, b"\0") + b"\0" + bytes(31)


def giant(num_bytes: int) -> bytes:
    """A command that announces more than it brings."""
    return greeting(b"CURVE") + LONG_COMMAND + struct.pack(">Q", num_bytes) + b"x" * 64


# What they send before they listen.
BYTES: Mapping[str, bytes] = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "zeros": bytes(256),
    "noise": bytes((i * 131 + 7) % 256 for i in range(4096)),
    "old protocol": b"\x01\x00\x03\x00hi",
    "no mechanism": greeting(b"NULL") + b"\x04\x1a\x05READY" + bytes(20),
    "password": greeting(b"PLAIN") + b"\x04\x10\x05HELLO\x05admin\x03abc",
    "unknown mechanism": greeting(b"SESAME"),
    "wrong command": greeting(b"CURVE") + b"\x04\x05hello",
    "forged hello": greeting(b"CURVE") + b"\x04\xc8\x05HELLO\x01\x00" + bytes(192),
    "giant": giant(1 << 62),
    "giant that exists": giant(8 << 30),
    "pickle": b"\x80\x04\x95\x20cos\nsystem\n(S'true'\ntR." * 8,
}
# These say too little to be refused at once: their time runs out.
TRUNCATED: Mapping[str, bytes] = {
    "silent": b"",
    "truncated": SIGNATURE[:3],
    "greeting only": greeting(b"CURVE"),
}


def say(port: int, message: bytes) -> bytes:
    """Send bytes, and read until the other end hangs up; all it has said."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        heard = b""
        with contextlib.suppress(ConnectionError):
            connection.sendall(message)
            while part := connection.recv(4096):
                heard += part
        return heard


def with_keys(port: int, prepare: Callable[[zmq.Socket[bytes]], None]) -> None:
    """Knock with a ZeroMQ socket that ``prepare`` gives some keys, and insist on an answer."""
    context = zmq.Context()
    knocking = context.socket(zmq.DEALER)
    try:
        knocking.linger = 0
        knocking.setsockopt(zmq.RECONNECT_IVL, -1)
        prepare(knocking)
        monitor = knocking.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        knocking.connect(f"tcp://127.0.0.1:{port}")
        with contextlib.suppress(zmq.Again):  # turned away already
            knocking.send(os.urandom(64), zmq.DONTWAIT)
        assert monitor.poll(1000 * PATIENCE_S), "not turned away"
        assert not knocking.poll(0)
        knocking.disable_monitor()
    finally:
        context.destroy(linger=0)


def nobody(_: zmq.Socket[bytes]) -> None:
    """Has no key at all."""


def other_pool(socket: zmq.Socket[bytes]) -> None:
    """Holds the keys of another pool."""
    PoolKeys.generate().connect_with(socket)


def half_known(keys: PoolKeys) -> Callable[[zmq.Socket[bytes]], None]:
    """Knows whom it talks to, and is not a member itself."""

    def prepare(socket: zmq.Socket[bytes]) -> None:
        other_pool(socket)
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.binding_public)

    return prepare
