"""The global scheduler as a Ray actor.

Ray starts the actor again when its process dies, empty; it listens at the same port, so everybody's
connection finds it, and learns what there is from the instances.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zmq.asyncio

from llumsched.config import Config
from llumsched.logs import LogOptions, set_up
from llumsched.scheduler.controller import Controller
from llumsched.scheduler.metrics import PROCESS, keep_in
from llumsched.wire.keys import PoolKeys

logger = logging.getLogger(__name__)

ACTOR_NAME = "llumsched-global-scheduler"


class SchedulerActor:
    """The Ray actor around ``Controller``; its methods are coroutines of one event loop.

    Ray starts it again if it dies: at the same ``port``, so that everybody's connection finds it.
    It serves at once; that somebody calls it first would take its time.
    """

    def __init__(
        self,
        config: Config,
        keys: PoolKeys,
        host: str,
        port: int,
        decision_log: Path | None,
        logs: LogOptions | None = None,
        metrics_folder: Path | None = None,
        invitation: Mapping[str, Any] | None = None,
    ) -> None:
        self._invitation = invitation
        if logs is not None:
            set_up(PROCESS, logs)
        if metrics_folder is not None:
            keep_in(metrics_folder)
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

    async def invitation(self) -> Mapping[str, Any] | None:
        """For a frontend that wants to join; ``None`` if none can. The launcher knows its keys."""
        if self._invitation is None:
            return None
        return {**self._invitation, "scheduler": self._endpoint}

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
