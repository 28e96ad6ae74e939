"""The launcher's watch over the global scheduler: one that does not answer is ended.

Ray starts an actor again whose process has died; the watch only sees to it that a hung one dies.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import psutil
import ray

from llumsched.wire.ping import PingTimer

logger = logging.getLogger(__name__)

# One that does not answer for longer is killed, to be started again.
SCHEDULER_TIMEOUT_S = 3.0
PING_INTERVAL_S = 1.0
# A ping that is answered costs two looks.
WATCH_TICK_S = 0.5


class SchedulerWatch:
    """Ends a global scheduler that does not answer: Ray starts one again that has died."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller
        self._silence = PingTimer(self._ping, interval_s=PING_INTERVAL_S)
        self._process: psutil.Process | None = None

    def tick(self, awake_s: float) -> None:
        """Count ``awake_s`` seconds that have passed since the last call."""
        self._silence.tick(awake_s)
        if self._process is not None and self._silence.silent_s > SCHEDULER_TIMEOUT_S:
            logger.error("The global scheduler does not answer, and is started again")
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process.kill()
            self._process = None

    def _ping(self) -> Callable[[], bool]:
        answer = self._controller.pid.remote()

        def answered() -> bool:
            done, _ = ray.wait([answer], timeout=0)
            if not done:
                return False
            try:
                self._process = psutil.Process(ray.get(answer))
            except (ray.exceptions.RayError, psutil.NoSuchProcess) as error:
                logger.warning("The global scheduler is being started again: %s", error)
                self._process = None
            return True

        return answered
