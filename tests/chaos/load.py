"""Streams of every kind, compared with what the same pool answered while nothing happened to it.

All are deterministic: greedy, or sampled with a seed. So the answers must be the same to the letter
(logprobs to a tolerance), whatever became of the instances meanwhile.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.e2e.cases import COMPLETIONS, SINGLE, completion
from tests.e2e.client import Client, Whole, differences, in_parallel

NAMES = (
    "greedy",
    "seeded",
    "seeded with top_p, top_k, min_p",
    "penalties, seeded",
    "logit bias, bad words, min_tokens",
    "logprobs",
    "stop string",
    "guided by a JSON schema",
)
# Not near its end while an instance is emptied.
LONG = "long"
CASES = {name: SINGLE[name] for name in NAMES} | {LONG: (COMPLETIONS, completion(max_tokens=240))}


@dataclass
class References:
    """Fault-free answers, by name."""

    answers: dict[str, Whole] = field(default_factory=dict)

    @classmethod
    def of(cls, client: Client) -> References:
        """Ask for each."""
        references = cls()
        for name, case in CASES.items():
            references.answers[name] = client.whole(*case)
        return references

    def complaints(self, name: str, answer: Whole) -> list[str]:
        """Faults of an answer."""
        found = differences(answer.as_dict(), self.answers[name].as_dict())
        return [f"{name}: {sentence}" for sentence in found]


class Progress:
    """How far a group of streams is; ``when_all_have`` waits for the slowest."""

    def __init__(self, num_streams: int) -> None:
        self._num_chunks = [0] * num_streams
        self._changed = threading.Condition()

    def count(self, stream: int) -> None:
        with self._changed:
            self._num_chunks[stream] += 1
            self._changed.notify_all()

    def when_all_have(self, num_chunks: int, timeout_s: float = 100.0) -> None:
        with self._changed:
            reached = self._changed.wait_for(
                lambda: all(n >= num_chunks for n in self._num_chunks), timeout_s
            )
        assert reached, f"streams stand still: {self._num_chunks}"


def stream_through(
    client: Client,
    references: References,
    fault: Callable[[Progress], None],
    names: Sequence[str] = NAMES,
) -> int:
    """Stream all at once while ``fault`` happens; the number of tokens, all of which are right."""
    progress = Progress(len(names))
    complaints: list[str] = []
    num_tokens: list[int] = []

    def stream(number: int, name: str) -> None:
        answer = client.whole(*CASES[name], lambda *_: progress.count(number))
        complaints.extend(references.complaints(name, answer))
        assert answer.usage is not None
        num_tokens.append(answer.usage["completion_tokens"])

    in_parallel(
        *(lambda number=n, name=name: stream(number, name) for n, name in enumerate(names)),
        lambda: fault(progress),
    )
    assert not complaints, "\n".join(complaints)
    return sum(num_tokens)


class Load:
    """Streams of random kinds, one after the other on each of ``num_clients`` threads."""

    def __init__(self, client: Client, references: References, num_clients: int, seed: int) -> None:
        self._client = client
        self._references = references
        self._stopping = threading.Event()
        self.complaints: list[str] = []
        self.num_streams = 0
        self.num_tokens = 0
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}/{n}"),), daemon=True)
            for n in range(num_clients)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, rng: random.Random) -> None:
        while not self._stopping.is_set():
            name = rng.choice(NAMES)
            try:
                answer = self._client.whole(*CASES[name])
            except Exception as error:
                with self._lock:
                    self.complaints.append(f"{name}: {error!r}")
                continue
            with self._lock:
                self.complaints += self._references.complaints(name, answer)
                self.num_streams += 1
                self.num_tokens += (answer.usage or {}).get("completion_tokens", 0)

    def stop(self, timeout_s: float = 150.0) -> None:
        """Let the streams that have begun end."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout_s)
            assert not thread.is_alive(), "a stream does not end"
