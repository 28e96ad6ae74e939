"""A controller with peers that speak its messages over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from llumsched.config import Config
from llumsched.core.load import InstanceLoad, InstanceSpec
from llumsched.core.types import SchedulingRequest
from llumsched.scheduler.controller import Controller
from llumsched.wire.control import (
    Message,
    PlaceRequest,
    RegisterInstance,
    ReportLoad,
    Welcomed,
    decode_control,
    encode,
)
from llumsched.wire.keys import PoolKeys

TIMEOUT_S = 10.0
KEYS = PoolKeys.generate()


@dataclass
class Peer:
    """One connection to the controller."""

    socket: zmq.asyncio.Socket

    async def say(self, message: Message) -> None:
        await self.socket.send(encode(message))

    async def hear(self) -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            return decode_control(await self.socket.recv())


class Stage:
    """A controller that serves, and the peers that talk to it."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.context = zmq.asyncio.Context()
        self.endpoint = controller.bind(self.context, "127.0.0.1", KEYS)

    def peer(self) -> Peer:
        socket = self.context.socket(zmq.DEALER)
        socket.linger = 0
        KEYS.connect_with(socket)
        socket.connect(self.endpoint)
        return Peer(socket)

    async def instance(self, instance_id: str, index: int = 0) -> Peer:
        peer = self.peer()
        await peer.say(registration(instance_id, index))
        assert isinstance(await peer.hear(), Welcomed)
        await peer.say(ReportLoad(load=load(instance_id)))
        return peer


def registration(instance_id: str, index: int = 0) -> RegisterInstance:
    return RegisterInstance(
        spec=InstanceSpec(instance_id=instance_id, num_total_blocks=100, block_size=32),
        engine_index=index,
        peer_endpoint=f"tcp://{instance_id}",
        fingerprint="same",
    )


def load(instance_id: str, **changes: Any) -> InstanceLoad:
    values: dict[str, Any] = {
        "instance_id": instance_id,
        "sequence": 1,
        "num_total_blocks": 100,
        "num_free_blocks": 100,
    }
    return InstanceLoad(**(values | changes))


def place(request_id: str, **changes: Any) -> PlaceRequest:
    values: dict[str, Any] = {"request_id": request_id, "num_prompt_tokens": 64}
    return PlaceRequest(request=SchedulingRequest(**(values | changes)))


def run(
    scenario: Callable[[Stage], Awaitable[None]],
    *,
    config: Config | None = None,
    decision_log: Path | None = None,
    learning_s: float = 0.0,
    flush_interval_s: float = 1.0,
) -> None:
    async def play() -> None:
        controller = Controller(
            config or Config.default("latency"),
            decision_log=decision_log,
            learning_s=learning_s,
            flush_interval_s=flush_interval_s,
        )
        stage = Stage(controller)
        serving = asyncio.create_task(stage.controller.serve())
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await scenario(stage)
        finally:
            serving.cancel()
            stage.controller.close()
            stage.context.destroy(linger=0)

    asyncio.run(play())
