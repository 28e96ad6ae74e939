"""Plain vLLM's answers to every case: collected in one go, so that its server can then end."""

from __future__ import annotations

from typing import Any

from tests.e2e.cases import BROKEN, REFUSED, STREAMED, WHOLE
from tests.e2e.client import Answer, Client, Whole, in_parallel

# As many at once as keep both cores busy; float32 makes the answers those of each alone.
BATCH_SIZE = 4


class PlainAnswers:
    """All answers of plain vLLM, by the name of the case."""

    def __init__(self, client: Client) -> None:
        self.streamed: dict[str, Whole] = {}
        self.whole: dict[str, Answer] = {}
        self.refused: dict[str, Answer] = {}
        self.broken: dict[str, Answer] = {}

        def ask_streamed(name: str) -> None:
            self.streamed[name] = client.whole(*STREAMED[name])

        def ask_whole(name: str) -> None:
            self.whole[name] = ask(client, *WHOLE[name])

        names = list(STREAMED)
        for start in range(0, len(names), BATCH_SIZE):
            in_parallel(*(lambda n=n: ask_streamed(n) for n in names[start : start + BATCH_SIZE]))
        for name in WHOLE:
            ask_whole(name)
        for name, (path, body) in REFUSED.items():
            self.refused[name] = ask(client, path, body)
        self.metrics = metric_names(client.text("/metrics"))
        for name, case in BROKEN.items():
            self.broken[name] = ask_alone(client, *case)
        client.close()


def ask(client: Client, path: str, body: dict[str, Any] | bytes | None) -> Answer:
    """One request that is answered in one piece."""
    if body is None:
        return client.get(path)
    if isinstance(body, bytes):
        return client.post_bytes(path, body)
    return client.post(path, {"model": client.model, **body})


def ask_alone(client: Client, path: str, body: dict[str, Any]) -> Answer:
    """On a connection of its own: a server that breaks closes it, and whoever asks next on it may
    find that out too late."""
    return client.post(path, {"model": client.model, **body}, {"connection": "close"})


def metric_names(exposition: str) -> set[str]:
    """The names of all metrics in a page of Prometheus'."""
    return {line.split()[2] for line in exposition.splitlines() if line.startswith("# TYPE ")}
