"""A client of the end-to-end tests leaves when its test says so, and not before."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.e2e.client import Client

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = b'data: {"id": "first"}\n\n'
TIMEOUT_S = 10.0
SHORT_S = 0.2


class OneAnswer:
    """A server whose only answer has one chunk and no end."""

    def __init__(self) -> None:
        self.has_lost_its_client = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.close()
        self._thread.join(TIMEOUT_S)

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(TIMEOUT_S)
            connection.sendall(HEAD + b"%x\r\n%s\r\n" % (len(CHUNK), CHUNK))
            while connection.recv(1 << 16):
                pass  # the question
            self.has_lost_its_client.set()


@pytest.fixture
def server() -> Iterator[OneAnswer]:
    one = OneAnswer()
    yield one
    one.close()


def test_whoever_drops_the_chunks_has_not_left(server: OneAnswer) -> None:
    client = Client(server.url, "model")
    with client.stream("/", {}) as chunks:
        assert next(chunks) == {"id": "first"}
        del chunks
        assert not server.has_lost_its_client.wait(SHORT_S)
    assert server.has_lost_its_client.wait(TIMEOUT_S)
    client.close()
