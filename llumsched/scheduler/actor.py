"""The global scheduler as a Ray actor, and whoever sees to it that it serves.

Ray starts the actor again when its process dies, empty; it listens at the same port, so everybody's
connection finds it, and learns what there is from the instances.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
import zmq.asyncio

from llumsched.config import Config
from llumsched.instance.heartbeat import Silence
from llumsched.scheduler.controller import Controller
from llumsched.wire.keys import PoolKeys

logger = logging.getLogger(__name__)

ACTOR_NAME = "llumsched-global-scheduler"
# One that does not answer for longer is killed, to be started again.
SCHEDULER_TIMEOUT_S = 3.0
PING_INTERVAL_S = 0.5


class ControllerActor:
    """The Ray actor around ``Controller``; its methods are coroutines of one event loop.

    Ray starts it again if it dies: at the same ``port``, so that everybody's connection finds it.
    It serves at once; that somebody calls it first would take its time.
    """

    def __init__(
        self, config: Config, keys: PoolKeys, host: str, port: int, decision_log: Path | None
    ) -> None:
        self._controller = Controller(config, decision_log=decision_log)
        self._context = zmq.asyncio.Context()
        self._endpoint = self._controller.bind(self._context, host, keys, port)
        # Ray calls this in the event loop of the actor, since that has coroutines.
        self._serving = asyncio.create_task(self._controller.serve())
        self._serving.add_done_callback(_log_end)

    async def pid(self) -> int:
        """The id of its process, which lives."""
        return os.getpid()

    async def endpoint(self) -> str:
        """Where frontends and instances connect."""
        return self._endpoint

    async def close(self) -> None:
        """Stop serving, and write out the decision log; the actor may be killed afterwards."""
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self._controller.close()
        # Left to the garbage collector it may block for ever: that closes a context before sockets.
        self._context.destroy(linger=0)

    async def frontend_lost(self, frontend_id: str, request_ids: Sequence[str]) -> None:
        self._controller.frontend_lost(frontend_id, request_ids)
        await self._controller.flush()

    async def instance_lost(self, instance_id: str, reason: str) -> None:
        self._controller.instance_lost(instance_id, reason)
        await self._controller.flush()


def _log_end(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.critical("The global scheduler failed", exc_info=task.exception())


class SchedulerWatch:
    """Ends a global scheduler that does not answer: Ray starts one again that has died."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller
        self._silence = Silence(self._ping, interval_s=PING_INTERVAL_S)
        self._process: psutil.Process | None = None

    def tick(self, awake_s: float) -> None:
        """So much time has passed since the last call."""
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
