"""Requests that a dead frontend has left behind, at every instance and at the scheduler.

Every instance ends the requests of its place and says which they were; then the scheduler is told
to forget them, and those that only it knows of. Nothing here blocks: an instance that does not
answer is asked for its answer again, until it has answered or is dead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray

# After so many the scheduler is told, whoever has not answered: what it holds must not be placed.
ANSWERS_TIMEOUT_TICKS = 20


class FrontendLoss:
    """Args:
    instances: Ray actors of those that serve.
    controller: the scheduler's.
    client_index: the place of the frontend, as instances know it.
    frontend_id: its name, as the scheduler knows it.
    """

    def __init__(
        self, instances: Iterable[Any], controller: Any, client_index: int, frontend_id: str
    ) -> None:
        self._controller = controller
        self._frontend_id = frontend_id
        self._answers = [instance.abort_client.remote(client_index) for instance in instances]
        self._untold: list[str] = []
        self._num_ticks = 0
        self._telling: tuple[Any, int] | None = None
        self._is_told = False

    def is_settled(self) -> bool:
        """Go on with it; whether every instance has ended the requests and the scheduler knows."""
        self._num_ticks += 1
        self._take_answers()
        if self._telling is not None:
            self._take_word(*self._telling)
        is_known = self._is_told and not self._untold
        has_waited = not self._answers or self._num_ticks >= ANSWERS_TIMEOUT_TICKS
        if not is_known and has_waited and self._telling is None:
            telling = self._controller.frontend_lost.remote(self._frontend_id, list(self._untold))
            self._telling = telling, len(self._untold)
        return is_known and not self._answers

    def _take_answers(self) -> None:
        if not self._answers:
            return
        num_answers = len(self._answers)
        answered, self._answers = ray.wait(self._answers, num_returns=num_answers, timeout=0)
        for answer in answered:
            try:
                self._untold += ray.get(answer)
            except ray.exceptions.RayActorError:
                continue  # it is dead, and its requests with it

    def _take_word(self, telling: Any, num_told: int) -> None:
        heard, _ = ray.wait([telling], timeout=0)
        if not heard:
            return
        self._telling = None
        try:
            ray.get(telling)
        except ray.exceptions.RayActorError:
            return  # the scheduler died, and is told again
        self._is_told = True
        del self._untold[:num_told]
