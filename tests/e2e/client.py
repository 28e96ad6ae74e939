"""A client that keeps everything a server says, and compares it with what another said.

Ids and times differ from one run to the next and are left out; floats are compared to
``TOLERANCE``, for logprobs differ in the last digits with what else is in the batch.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx

REQUEST_TIMEOUT_S = 120.0
IDLE_TIMEOUT_S = 30.0
POLL_INTERVAL_S = 0.05
TOLERANCE = 1e-3

# Ids and times, in every kind of answer.
DIFFERS = frozenset({"id", "created", "created_at", "completed_at", "request_id"})
# Fields of a chunk that go on where the chunk before ended.
TEXTS = frozenset({"text", "content"})

Body = Mapping[str, Any]
Chunk = dict[str, Any]


class Answer(NamedTuple):
    """Status and decoded body."""

    status: int
    body: Any


class Client:
    """Talks to one server, from any thread."""

    def __init__(self, url: str, model: str, api_key: str | None = None) -> None:
        self.model = model
        headers = {"authorization": f"Bearer {api_key}"} if api_key is not None else {}
        self._http = httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S, headers=headers)

    def close(self) -> None:
        self._http.close()

    def get(self, path: str) -> Answer:
        return _answer(self._http.get(path))

    def post(self, path: str, body: Body, headers: Mapping[str, str] | None = None) -> Answer:
        return _answer(self._http.post(path, json=dict(body), headers=headers))

    def post_bytes(self, path: str, body: bytes) -> Answer:
        headers = {"content-type": "application/json"}
        return _answer(self._http.post(path, content=body, headers=headers))

    def text(self, path: str) -> str:
        response = self._http.get(path)
        response.raise_for_status()
        return response.text

    @contextmanager
    def stream(self, path: str, body: Body) -> Iterator[Iterator[Chunk]]:
        """The chunks of a streamed answer; leaving early closes the connection.

        Whoever takes one chunk and drops the iterator has not left: httpx would close the
        connection with it, so it is held until the end.
        """
        asked = {"model": self.model, "stream": True, **body}
        with self._http.stream("POST", path, json=asked) as response:
            if response.status_code != 200:
                response.read()
                raise AssertionError(f"{path}: {response.status_code} {response.text}")
            chunks = _chunks(response.iter_lines())
            yield chunks

    def whole(
        self, path: str, body: Body, on_chunk: Callable[[int, Chunk], None] | None = None
    ) -> Whole:
        """A streamed answer, read to its end. ``on_chunk(number, chunk)`` counts from 1."""
        chunks = []
        with self.stream(path, body) as stream:
            for chunk in stream:
                chunks.append(chunk)
                if on_chunk is not None:
                    on_chunk(len(chunks), chunk)
        return collect(chunks)


class Admin(Client):
    """A client of llumsched's admin API as well."""

    @classmethod
    @contextmanager
    def at_rest(cls, url: str, model: str, api_key: str | None = None) -> Iterator[Admin]:
        """A client of a pool that is at rest, and must be so again at the end."""
        pool = cls(url, model, api_key)
        # The test before has waited for more.
        pool.await_idle(num_reports=0)
        yield pool
        pool.await_idle()
        pool.close()

    def instances(self) -> dict[str, dict[str, Any]]:
        """The latest load report of each instance."""
        answer = self.get("/llumsched/instances")
        assert answer.status == 200, answer
        return {i["instance_id"]: i["load"] for i in answer.body["instances"]}

    def requests(self) -> list[dict[str, Any]]:
        answer = self.get("/llumsched/requests")
        assert answer.status == 200, answer
        found: list[dict[str, Any]] = answer.body["requests"]
        return found

    def request(self, request_id: str) -> dict[str, Any]:
        """The one unfinished sequence of a request."""
        (found,) = (r for r in self.requests() if belongs(r, request_id))
        return found

    def migrate(self, request_id: str, destination: str | None = None) -> Answer:
        body = {"request_id": request_id}
        if destination is not None:
            body["destination"] = destination
        return self.post("/llumsched/migrations", body)

    def await_idle(self, num_reports: int = 1) -> None:
        """Wait until no request is left anywhere and every block is free, and still is after so
        many more reports of each instance. An idle instance reports once a second."""
        deadline_s = time.monotonic() + IDLE_TIMEOUT_S
        idle_since: dict[str, int] | None = None
        while True:
            requests, loads = self.requests(), self.instances()
            if not requests and all(map(is_idle, loads.values())):
                sequences = {name: load["sequence"] for name, load in loads.items()}
                idle_since = idle_since or sequences
                if all(sequences[name] >= idle_since[name] + num_reports for name in sequences):
                    return
            else:
                idle_since = None
            assert time.monotonic() < deadline_s, f"not idle: {requests} {loads}"
            time.sleep(POLL_INTERVAL_S)


def belongs(request: Mapping[str, Any], request_id: str) -> bool:
    """True if an entry of ``GET /llumsched/requests`` is (a sequence of) this answer's."""
    external_id: str = request["external_id"]
    return external_id == request_id or external_id.startswith(f"{request_id}-")


def is_idle(load: Mapping[str, Any]) -> bool:
    """True if an instance reports every block free and no request."""
    return load["num_free_blocks"] == load["num_total_blocks"] and not any(
        load[what]
        for what in (
            "num_running",
            "num_waiting",
            "num_reserved_blocks",
            "num_migrations_in",
            "num_migrations_out",
        )
    )


@dataclass(frozen=True, slots=True)
class Whole:
    """All that a streamed answer said, however it was cut into chunks.

    ``choices`` maps the index of a choice to its fields: texts and lists put together, of
    everything else the last word.
    """

    choices: dict[int, dict[str, Any]]
    usage: dict[str, Any] | None

    @property
    def text(self) -> str:
        """The text of the only choice."""
        (choice,) = self.choices.values()
        text: str = choice["text"] if "text" in choice else choice["content"]
        return text

    def as_dict(self) -> dict[str, Any]:
        return {"choices": self.choices, "usage": self.usage}


def collect(chunks: Sequence[Chunk]) -> Whole:
    """Put the chunks of a stream together."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in chunks:
        assert "error" not in chunk, chunk
        usage = chunk.get("usage") or usage
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {})
            for name, value in (part | part.get("delta", {})).items():
                if name not in ("index", "delta"):
                    choice[name] = _joined(name, choice.get(name), value)
    return Whole(dict(sorted(choices.items())), usage)


def _joined(name: str, before: Any, value: Any) -> Any:
    if before is None or value is None:
        return before if value is None else value
    if name in TEXTS or isinstance(value, list):
        return before + value
    if isinstance(value, dict):
        return {key: _joined(key, before.get(key), value.get(key)) for key in before | value}
    return value


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """One sentence for each place at which two answers differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return [
            sentence
            for key in sorted((found.keys() | expected.keys()) - DIFFERS, key=str)
            for sentence in differences(
                found.get(key, "nothing"), expected.get(key, "nothing"), f"{where}.{key}"
            )
        ]
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        return [
            sentence
            for index, (a, b) in enumerate(zip(found, expected, strict=True))
            for sentence in differences(a, b, f"{where}[{index}]")
        ]
    if isinstance(found, float) and isinstance(expected, float):
        same = math.isclose(found, expected, rel_tol=0.0, abs_tol=TOLERANCE)
    else:
        same = found == expected
    return [] if same else [f"{where}: {found!r}, expected {expected!r}"]


def in_parallel(*calls: Callable[[], None]) -> None:
    """Run all at once, each on a thread of its own; raises what the first of them raised."""
    failures: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(REQUEST_TIMEOUT_S)
        assert not thread.is_alive(), "a call did not return in time"
    if failures:
        raise failures[0]


def _answer(response: httpx.Response) -> Answer:
    try:
        return Answer(response.status_code, response.json())
    except ValueError:
        return Answer(response.status_code, response.text)


def _chunks(lines: Iterator[str]) -> Iterator[Chunk]:
    for line in lines:
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            return
        yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream broke off")
