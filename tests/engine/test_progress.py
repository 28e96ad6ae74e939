"""The progress of vLLM's running requests in a load report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

from llumsched.engine.vllm.load import LoadReader


@dataclass
class Running:
    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens

    def decode(self) -> None:
        self.num_computed_tokens = self.num_tokens
        self.num_output_tokens += 1


def reader(running: list[Running]) -> LoadReader:
    made = object.__new__(LoadReader)
    made._told = {}
    requests = {request.request_id: request for request in running}
    made._scheduler = SimpleNamespace(running=running, requests=requests)  # type: ignore[assignment]
    return made


def told(progress: Iterator[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    return list(progress)


def test_only_what_does_not_follow_from_the_steps_is_told() -> None:
    a, b = Running("a", 10), Running("b", 100)
    running = [a, b]
    progress = reader(running)._progress
    b.num_computed_tokens = 60
    a.decode()
    assert told(progress(1)) == [("a", 10, 1), ("b", 60, 0)]
    a.decode()
    b.decode()
    # `a` came on by its one step; the first token of `b` is news.
    assert told(progress(2)) == [("b", 100, 1)]
    a.decode()
    b.decode()
    assert told(progress(3)) == []
    # A step that `b` was left out of, and one that gave `a` two tokens.
    a.decode()
    a.decode()
    assert told(progress(4)) == [("a", 14, 5), ("b", 101, 2)]


def test_a_request_that_comes_back_is_told_anew() -> None:
    a = Running("a", 10)
    running = [a]
    progress = reader(running)._progress
    a.decode()
    assert told(progress(1)) == [("a", 10, 1)]
    running.clear()
    assert told(progress(2)) == [("a", 0, 1)]
    assert told(progress(3)) == []
    a.num_computed_tokens = 0
    running.append(a)
    assert told(progress(4)) == [("a", 0, 1)]
