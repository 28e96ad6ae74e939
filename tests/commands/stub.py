"""A server that answers as the admin API does, or as the test says, and remembers the bodies."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, object]


def make_load(**fields: Any) -> dict[str, Any]:
    """A load report as the admin API renders it."""
    load = {
        "num_total_blocks": 63,
        "num_free_blocks": 63,
        "num_reserved_blocks": 0,
        "num_running": 0,
        "num_waiting": 0,
        "step_time_s": 0.0,
    }
    return load | fields


def make_instance(instance_id: str, load: dict[str, Any] | None, **fields: Any) -> dict[str, Any]:
    """One instance as the admin API renders it."""
    instance = {
        "instance_id": instance_id,
        "state": "serving",
        "role": "mixed",
        "freeness": None,
        "report_age_s": 0.08,
        "load": load,
        "cannot_migrate": "",
    }
    return instance | fields


def make_berth(instance_id: str, **fields: Any) -> dict[str, Any]:
    """The place of one instance as the admin API renders it."""
    berth = {
        "instance_id": instance_id,
        "pid": 4711,
        "state": "running",
        "num_deaths": 0,
        "last_failure": "",
        "retry_in_s": None,
        "node": "10.0.0.1",
    }
    return berth | fields


def make_report(**fields: Any) -> dict[str, Any]:
    """A committed migration as the admin API renders it."""
    report = {
        "migration_id": "m-1",
        "request_id": "chatcmpl-1",
        "source": "instance-0",
        "destination": "instance-1",
        "outcome": "committed",
        "reason": "",
        "num_stages": 3,
        "num_blocks": 38,
        "num_cached_blocks": 0,
        "num_bytes": 28_016_640,
        "num_tokens": 1201,
        "num_output_tokens": 61,
        "total_s": 0.212,
        "suspended_s": 0.0384,
        "step_time_s": 0.0311,
        "transport": "shared memory",
    }
    return report | fields


def error(status: int, message: str) -> Answer:
    """An error in the shape that OpenAI's API and the admin API share."""
    return status, {"error": {"message": message, "type": "E", "param": None, "code": status}}


class Stub:
    """``answers`` by path; ``bodies`` are those of the posts, in order, ``authorizations`` what was
    sent to prove who asks."""

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        self.answers = dict(answers)
        self.bodies: list[object] = []
        self.authorizations: list[str | None] = []
        self.headers: dict[str, str] = {}
        self.url = ""


@contextlib.contextmanager
def serving(answers: Mapping[str, Answer]) -> Iterator[Stub]:
    """A stub on a free port of loopback, for as long as the block lasts."""
    stub = Stub(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stub.authorizations.append(self.headers["Authorization"])
            status, answer = stub.answers.get(self.path, (404, {"detail": "Not Found"}))
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in stub.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            stub.bodies.append(json.loads(self.rfile.read(length)))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Nothing: the test asserts on what it needs."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
