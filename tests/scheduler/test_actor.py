"""The global scheduler as Ray starts it, and starts it again."""

from __future__ import annotations

import asyncio
import socket

from llumsched.config import Config
from llumsched.frontend.routing.scheduler_client import SchedulerClient
from llumsched.scheduler.actor import SchedulerActor
from llumsched.wire.keys import PoolKeys

TIMEOUT_S = 20.0


def test_one_that_is_started_again_answers_before_anybody_calls_it() -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        keys = PoolKeys.generate()
        link = SchedulerClient(f"tcp://127.0.0.1:{port}", keys, lambda: None)
        actor = SchedulerActor(Config(policy="latency"), keys, "127.0.0.1", port, None)
        try:
            description = await link.describe(TIMEOUT_S)
        finally:
            link.close()
            await actor.close()
        assert description.policy == "latency"
        assert not description.instances

    asyncio.run(scenario())
