"""Requests that come to a paused engine are asked of another, and rejected once all are paused."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1 import engine as messages
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from llumsched.frontend.routing.client import RoutingEngineClient
from llumsched.frontend.routing.engine_labels import EngineLabels
from llumsched.frontend.routing.resumer import Resumer
from llumsched.frontend.routing.routes import Routes
from tests.builders import engine_request


def received(instance: int, *, retryable: bool, tokens: Any) -> Any:
    """Outputs as an engine sends them: ``tokens``, or the error of a paused one.

    vLLM before 0.33 has no such error; there the message is one of 0.33's shape.
    """
    fields = {"code": "engine_paused", "message": "Generation is paused.", "retryable": retryable}
    reason = None if tokens else FinishReason.ERROR
    output: Any = EngineCoreOutput("r1", list(tokens), finish_reason=reason)
    if hasattr(messages, "RequestError"):
        output.error = None if tokens else messages.RequestError(**fields)
        sent = EngineCoreOutputs(engine_index=instance, outputs=[output])
        return MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
    output = SimpleNamespace(
        request_id="r1",
        new_token_ids=list(tokens),
        finish_reason=reason,
        error=None if tokens else SimpleNamespace(**fields),
    )
    return SimpleNamespace(
        engine_index=instance, utility_output=None, outputs=[output], scheduler_stats=None
    )


class World:
    """A client of three instances, of which the first has been sent the request."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, str]] = []
        client: Any = RoutingEngineClient.__new__(RoutingEngineClient)
        self.client = client
        client.labels = EngineLabels(3)
        client.routes = Routes()
        client._resumer = Resumer(client.routes, client, client, lambda *_: None)
        client._unheard = set()
        client._tasks = set()
        self.told: list[int] = []
        client._placer = SimpleNamespace(
            ended=lambda *_, **__: None,
            sent_elsewhere=lambda _, instance: self.told.append(instance),
        )
        client.utility_results = {}
        client.outputs_queue = asyncio.Queue()
        client.add = self._add
        for instance in range(3):
            client.labels.take(instance)
        client.routes.open("r1").instance = 0
        client._resumer.keep(engine_request())

    async def _add(self, instance: int, request: EngineCoreRequest) -> None:
        self.sent.append((instance, request.request_id))

    async def hears(self, instance: int, *, retryable: bool = True, tokens: Any = ()) -> Any:
        """The outputs that are passed on of an instance's; all are errors, but for tokens."""
        self.client._take_in(received(instance, retryable=retryable, tokens=tokens))
        await asyncio.sleep(0)
        found = []
        while not self.client.outputs_queue.empty():
            found += self.client.outputs_queue.get_nowait().outputs
        return found


def test_another_instance_is_asked_until_all_have_been() -> None:
    async def scenario() -> None:
        world = World()
        assert await world.hears(0) == []
        assert world.sent == [(1, "r1")]
        assert await world.hears(1) == []
        assert world.sent == [(1, "r1"), (2, "r1")]
        assert world.told == [1, 2], "the scheduler counts it where it is"
        (rejected,) = await world.hears(2)
        assert rejected.error.retryable
        assert world.client.routes.get("r1") is None

    asyncio.run(scenario())


def test_its_tokens_are_those_of_the_instance_that_took_it() -> None:
    async def scenario() -> None:
        world = World()
        await world.hears(0)
        assert len(await world.hears(1, tokens=[7])) == 1
        assert world.client.routes.get("r1").output_token_ids == [7]

    asyncio.run(scenario())


@pytest.mark.parametrize("begun", [True, False])
def test_other_errors_are_the_clients(begun: bool) -> None:
    """An error that would be the same anywhere, or one after the first token."""

    async def scenario() -> None:
        world = World()
        if begun:
            await world.hears(0, tokens=[7])
        assert len(await world.hears(0, retryable=begun)) == 1
        assert world.sent == []

    asyncio.run(scenario())
