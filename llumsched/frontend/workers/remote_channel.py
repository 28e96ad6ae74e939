"""Channels between a launcher and frontends that it has not started, perhaps of other machines.

A frontend that joins connects to the launcher's one socket (``door``). Each side has one
thread for it, so both go on to give signs of life whatever else they do. A frontend is gone when
its connection breaks, which is when its process ends, or when it is silent for ``SILENT_S``, as
when its machine has lost power. It is told so if it still lives, and ends.

This module does not know what launcher and frontend say to each other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from llumsched.frontend.workers.channel import ChannelClosed
from llumsched.frontend.workers.messages import JoinPool
from llumsched.wire.control import encode
from llumsched.wire.keys import COUNTED_EVENTS, PoolKeys

logger = logging.getLogger(__name__)

BEAT_INTERVAL_S = 1.0
SILENT_S = 10.0
BEAT = b""
# To a frontend that is taken for dead, or that the launcher has never heard of.
GONE = b"gone"
LINGER_MS = 500


class RemoteChannel:
    """One end of a channel, as ``channel.Channel``.

    Args:
        send: takes a message to the other end, without waiting; from any thread.
    """

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send = send
        self._received: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.is_closed = False
        self.heard_s = time.monotonic()

    def send(self, payload: bytes) -> None:
        """Send one message.

        Raises:
            ChannelClosed: and nothing more can be sent.
        """
        if self.is_closed:
            raise ChannelClosed("the other end is gone")
        self._send(payload)

    def receive(self, timeout_s: float | None = None) -> bytes:
        """The next message.

        Raises:
            ChannelClosed: at the end, or when nothing has come in time.
        """
        try:
            payload = self._received.get(timeout=timeout_s)
        except queue.Empty:
            raise ChannelClosed(f"nothing came within {timeout_s:.0f} s") from None
        if payload is None:
            self._received.put(None)  # for whoever asks again
            raise ChannelClosed("the other end is gone")
        return payload

    def take_in(self, payload: bytes) -> None:
        """Something has come from the other end."""
        self.heard_s = time.monotonic()
        if payload != BEAT:
            self._received.put(payload)

    def close(self) -> None:
        """Tell the other end that this one is gone, and wake up who receives here; safe to call
        twice."""
        if not self.is_closed:
            self.is_closed = True
            self._send(GONE)
            self._received.put(None)


class Post:
    """A socket that one thread sends and receives by; ``send`` may be called from any.

    Args:
        take_in: called on the thread with the frames of each message.
        beat: called on the thread once a ``BEAT_INTERVAL_S``, or oftener.
        happened: called on the thread with what becomes of connections, before any message that
            came by one made later.
    """

    def __init__(
        self,
        name: str,
        socket: zmq.Socket[bytes],
        take_in: Callable[[list[zmq.Frame]], None],
        beat: Callable[[], None],
        happened: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._socket = socket
        self._take_in, self._beat, self._happened = take_in, beat, happened
        self._monitor: Any = socket.get_monitor_socket(COUNTED_EVENTS) if happened else None
        self._outbox: deque[list[bytes]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._waking = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to send and to receive."""
        self._thread.start()

    def send(self, *frames: bytes) -> None:
        """Have a message sent; nothing once it is closed."""
        with self._waking:
            if not self._closing.is_set():
                self._outbox.append(list(frames))
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Send what is left, and end the thread; then the socket is the caller's to close. Safe to
        call twice."""
        with self._waking:
            if self._closing.is_set():
                return
            self._closing.set()
            os.eventfd_write(self._wake, 1)
        self._thread.join()
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
        os.close(self._wake)

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._socket, self._wake, *([self._monitor] if self._monitor else [])):
            poller.register(source, zmq.POLLIN)
        beaten_s = 0.0
        while not self._closing.is_set():
            poller.poll(int(1000 * BEAT_INTERVAL_S))
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            self._receive()
            if time.monotonic() - beaten_s >= BEAT_INTERVAL_S:
                beaten_s = time.monotonic()
                self._beat()
            self._send_all()
        self._send_all()

    def _receive(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self._hear_of_connections()
                frames: Any = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
                try:
                    self._take_in(frames)
                except Exception:  # the next message may be of another
                    logger.exception("A message of a frontend, or to it, was not taken in")

    def _hear_of_connections(self) -> None:
        if self._happened is None:
            return
        with contextlib.suppress(zmq.Again):
            while True:
                event = self._monitor.recv_multipart(zmq.NOBLOCK)
                self._happened(parse_monitor_message(event))

    def _send_all(self) -> None:
        while self._outbox:
            with contextlib.suppress(zmq.Again):  # who reads nothing is silent before long
                self._socket.send_multipart(self._outbox.popleft(), zmq.NOBLOCK)


class DoorBell:
    """A frontend's connection to the door of the launcher; ``channel`` is its end of it."""

    def __init__(self, endpoint: str, keys: PoolKeys, wish: JoinPool) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        keys.connect_with(self._socket)
        self._socket.connect(endpoint)
        self._post = Post("launcher-remote", self._socket, self._take_in, self._beat)
        self.channel = RemoteChannel(self._post.send)
        self._post.send(encode(wish))
        self._post.start()

    def close(self) -> None:
        """Tell the launcher that this frontend is gone; safe to call twice."""
        self.channel.close()
        self._post.close()
        self._socket.close(linger=LINGER_MS)
        self._context.term()

    def _take_in(self, frames: list[zmq.Frame]) -> None:
        payload = frames[-1].bytes
        if payload == GONE:
            self.channel.close()
        else:
            self.channel.take_in(payload)

    def _beat(self) -> None:
        if time.monotonic() - self.channel.heard_s > SILENT_S:
            self.channel.close()
        elif not self.channel.is_closed:
            self._post.send(BEAT)
