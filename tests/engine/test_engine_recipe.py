"""The recipe for an engine, done as it says: its file, its line, and a request that moves.

Scheduler, llumlets and migrators are those that ship; the engine computes each token from what its
KV cache holds.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

import pytest

from llumsched.config import Config
from llumsched.core.migration.source.record import MigrationOptions
from llumsched.core.transfer_options import TransferOptions
from llumsched.engine.factory import ENGINES, build_engine
from llumsched.instance.llumlet import Llumlet
from llumsched.policies.low_priority_short import LowPriorityShort
from llumsched.wire.control import (
    ClusterDescription,
    DescribeCluster,
    MigrateAnswer,
    MigrateRequest,
)
from tests.fake_engine.instance import FakeInstanceEngine, FakeSettings
from tests.fake_engine.request import expected_output
from tests.scheduler.stage import KEYS, Peer, Stage, place, run

if TYPE_CHECKING:
    from llumsched.engine.base import InstanceEngine
    from llumsched.engine.vllm.instance_engine import VllmEngine

    # The types of both are checked here, where a line is only text.
    ALL: tuple[type[InstanceEngine], ...] = (VllmEngine, FakeInstanceEngine)

PROMPT, NUM_OUTPUT_TOKENS = list(range(50)), 150


@asynccontextmanager
async def instance(stage: Stage, index: int) -> AsyncIterator[FakeInstanceEngine]:
    """An instance of the engine that the factory builds, until it has left."""
    name, settings = f"instance-{index}", FakeSettings(engine_index=index)
    built = build_engine(settings, instance_id=name, keys=KEYS, reports_prefix_blocks=False)
    engine = cast(FakeInstanceEngine, built)
    llumlet = Llumlet(
        engine=engine,
        instance_id=name,
        victim=LowPriorityShort(),
        scheduler_endpoint=stage.endpoint,
        keys=KEYS,
        host="127.0.0.1",
        options=MigrationOptions(),
        transfer=TransferOptions(transport="tcp"),
    )
    thread = threading.Thread(target=engine.run)
    thread.start()
    told = asyncio.create_task(llumlet.run())
    try:
        yield engine
    finally:
        told.cancel()
        await asyncio.gather(told, return_exceptions=True)
        engine.request_shutdown()
        await asyncio.to_thread(thread.join)


async def both_serve(frontend: Peer) -> None:
    described = None
    while not isinstance(described, ClusterDescription) or len(described.instances) < 2:
        await frontend.say(DescribeCluster(call_id=0))
        described = await frontend.hear()


def test_a_request_moves_between_two_of_an_engine_that_is_one_file_and_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ENGINES, "fake", "tests.fake_engine.instance:FakeInstanceEngine")

    async def scenario(stage: Stage) -> None:
        frontend = stage.peer()
        async with instance(stage, 0) as first, instance(stage, 1) as second:
            await both_serve(frontend)
            await frontend.say(place("r1", num_prompt_tokens=len(PROMPT)))
            assert (await frontend.hear()).instance_id == "instance-0"
            first.call(lambda: first.migration.add_request("r1", PROMPT, NUM_OUTPUT_TOKENS))
            outcome = None
            while outcome != "committed":  # at first it may not decode yet
                await frontend.say(
                    MigrateRequest(call_id=1, request_id="r1", destination="instance-1")
                )
                answer = await frontend.hear()
                assert isinstance(answer, MigrateAnswer)
                outcome = answer.report and answer.report.outcome
            found: dict[int, int] = {}
            while len(found) < NUM_OUTPUT_TOKENS:
                await asyncio.wrap_future(second.call(lambda: None))
                found = first.outputs["r1"] | second.outputs.get("r1", {})
        assert [found[i] for i in range(NUM_OUTPUT_TOKENS)] == expected_output(
            PROMPT, NUM_OUTPUT_TOKENS
        )
        assert second.outputs["r1"]

    run(scenario, config=Config.default("round_robin"))
