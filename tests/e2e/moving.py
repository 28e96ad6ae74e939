"""Moving a request while its answer streams."""

from __future__ import annotations

import time
from typing import Any

from tests.e2e.client import REQUEST_TIMEOUT_S, Admin, Answer, Chunk

POLL_INTERVAL_S = 0.05


class Mover:
    """Moves a request of one sequence as soon as it has streamed each of ``at`` tokens.

    Hand it to ``Client.whole``. The request decodes on while it moves: only the reading of its
    stream waits. ``answers`` are those of the admin API.
    """

    def __init__(self, pool: Admin, at: tuple[int, ...]) -> None:
        self._pool = pool
        self._at = list(at)
        self._num_tokens = 0
        self.answers: list[Answer] = []

    def __call__(self, _number: int, chunk: Chunk) -> None:
        self._num_tokens += sum(len(c.get("token_ids") or ()) for c in chunk["choices"])
        if self._at and self._num_tokens >= self._at[0]:
            self._at.pop(0)
            self.answers.append(move(self._pool, chunk["id"]))

    @property
    def reports(self) -> list[dict[str, Any]]:
        """Answers of the admin API to each move, all of which must have been carried out."""
        for answer in self.answers:
            assert answer.status == 200, answer
        return [answer.body for answer in self.answers]


def move(pool: Admin, request_id: str, destination: str | None = None) -> Answer:
    """Move a request; if as many others move already as may at a time, when one has arrived."""
    deadline_s = time.monotonic() + REQUEST_TIMEOUT_S
    while True:
        answer = pool.migrate(request_id, destination)
        if answer.status != 409:
            return answer
        reason = answer.body["error"]["message"]
        others_move = "its limit" in reason or "no other instance can receive" in reason
        if not others_move or time.monotonic() > deadline_s:
            return answer
        time.sleep(POLL_INTERVAL_S)
