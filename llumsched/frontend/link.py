"""The frontend's connection to the global scheduler.

One DEALER socket: every request asks for its instance and every ended one is told; operators'
calls use it too. If the scheduler does not answer in time, requests go to the instance that
runs fewest of this frontend's own, so serving goes on without it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import zmq
import zmq.asyncio
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import EngineCoreRequest

from llumsched.core.types import SchedulingRequest, priority_class
from llumsched.engine.vllm.hints import predict
from llumsched.frontend.hints import Hints, current
from llumsched.runtime.messages import (
    ClusterDescription,
    DescribeCluster,
    Message,
    MigrateAnswer,
    MigrateRequest,
    Placed,
    PlaceRequest,
    RegisterFrontend,
    RequestEnded,
    Welcomed,
    decode_control,
    encode,
)

logger = logging.getLogger(__name__)

# A scheduler that decides answers within a millisecond; one that holds a request says nothing
# until it is placed, so only the probe below tells a held request from a dead scheduler.
PLACEMENT_TIMEOUT_S = 1.0
PROBE_TIMEOUT_S = 1.0


class SchedulerUnavailable(Exception):
    """The global scheduler does not answer."""


class SchedulerLink:
    """Args:
    endpoint: the scheduler's control socket.
    engine_indices: ZMQ index of each instance id.
    least_loaded: chooses an instance when the scheduler is silent.
    prefix_hashes: names the blocks of a prompt, where the scheduler's policies want them.
    """

    def __init__(
        self,
        endpoint: str,
        engine_indices: Mapping[str, int],
        least_loaded: Callable[[], int],
        prefix_hashes: Callable[[EngineCoreRequest], tuple[int, ...]] | None = None,
    ) -> None:
        self._engine_indices = dict(engine_indices)
        self._least_loaded = least_loaded
        self._prefix_hashes = prefix_hashes
        self._placements: dict[str, asyncio.Future[Placed]] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count(1)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(endpoint)
        self._receiving = asyncio.create_task(self._receive())
        self._sending: set[asyncio.Task[None]] = set()
        self._post(RegisterFrontend(frontend_id="frontend-0"))

    async def place(self, request: EngineCoreRequest) -> int:
        """The instance for a request, which takes the scheduler's prediction along.

        Raises:
            GracefulHTTPError: 503, if the scheduler rejects it; the message says why.
        """
        future: asyncio.Future[Placed] = asyncio.get_running_loop().create_future()
        self._placements[request.request_id] = future
        try:
            prefix_hashes = self._prefix_hashes(request) if self._prefix_hashes else ()
            described = for_scheduling(request, current(), prefix_hashes)
            await self._socket.send(encode(PlaceRequest(request=described)))
            while True:
                try:
                    placed = await asyncio.wait_for(asyncio.shield(future), PLACEMENT_TIMEOUT_S)
                    break
                except TimeoutError:
                    if not await self._is_alive():
                        instance = self._least_loaded()
                        logger.warning(
                            "The global scheduler is silent; request %s goes to instance %d",
                            request.request_id,
                            instance,
                        )
                        return instance
        finally:
            self._placements.pop(request.request_id, None)
        if placed.instance_id is None:
            raise Rejected(placed.reason, placed.retry_after_s)
        if placed.predicted_output_tokens is not None and request.sampling_params is not None:
            predict(request.sampling_params, placed.predicted_output_tokens)
        return self._engine_indices[placed.instance_id]

    def ended(
        self, request_id: str, *, aborted: bool, num_output_tokens: int | None = None
    ) -> None:
        self._post(
            RequestEnded(
                request_id=request_id, aborted=aborted, num_output_tokens=num_output_tokens
            )
        )

    async def migrate(
        self, request_id: str, destination: str | None, timeout_s: float
    ) -> MigrateAnswer:
        """Have a request moved; returns when it has moved or could not."""
        call_id = next(self._call_ids)
        answer: MigrateAnswer = await self._call(
            call_id,
            MigrateRequest(call_id=call_id, request_id=request_id, destination=destination),
            timeout_s,
        )
        return answer

    async def describe(self, timeout_s: float) -> ClusterDescription:
        call_id = next(self._call_ids)
        answer: ClusterDescription = await self._call(
            call_id, DescribeCluster(call_id=call_id), timeout_s
        )
        return answer

    def close(self) -> None:
        self._receiving.cancel()
        for task in list(self._sending):
            task.cancel()
        self._socket.close(linger=0)
        self._context.term()

    async def _is_alive(self) -> bool:
        try:
            await self.describe(PROBE_TIMEOUT_S)
        except SchedulerUnavailable:
            return False
        return True

    async def _call(self, call_id: int, message: Message, timeout_s: float) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            await self._socket.send(encode(message))
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise SchedulerUnavailable(
                f"The global scheduler did not answer within {timeout_s:.0f} s."
            ) from None
        finally:
            self._calls.pop(call_id, None)

    def _post(self, message: Message) -> None:
        async def send() -> None:
            await self._socket.send(encode(message))

        task = asyncio.ensure_future(send())
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _receive(self) -> None:
        while True:
            message = decode_control(await self._socket.recv())
            match message:
                case Placed():
                    placement = self._placements.get(message.request_id)
                    if placement is not None and not placement.done():
                        placement.set_result(message)
                case MigrateAnswer() | ClusterDescription():
                    call = self._calls.get(message.call_id)
                    if call is not None and not call.done():
                        call.set_result(message)
                case Welcomed():
                    pass
                case _:
                    logger.warning("Dropped an unexpected %s", type(message).__name__)


class Rejected(GracefulHTTPError):
    """The scheduler rejects the request; vLLM's server answers 503 with the reason."""

    def __init__(self, reason: str, retry_after_s: float | None) -> None:
        hint = f" Try again in {math.ceil(retry_after_s)} s." if retry_after_s else ""
        super().__init__(
            f"No instance can take the request: {reason}.{hint}", HTTPStatus.SERVICE_UNAVAILABLE
        )


def for_scheduling(
    request: EngineCoreRequest, hints: Hints, prefix_hashes: tuple[int, ...] = ()
) -> SchedulingRequest:
    """What the scheduler is told of a request."""
    sampling = request.sampling_params
    prompt = request.prompt_token_ids
    priority = priority_class(request.priority)
    return SchedulingRequest(
        request_id=request.request_id,
        num_prompt_tokens=len(prompt) if prompt is not None else 0,
        max_output_tokens=sampling.max_tokens if sampling is not None else 1,
        scheduling_priority=priority,
        execution_priority=priority,
        client_id=hints.client_id,
        prefix_hashes=prefix_hashes,
        ttft_slo_s=hints.ttft_slo_s,
        tpot_slo_s=hints.tpot_slo_s,
    )
