"""The frontend's connection to the global scheduler.

One DEALER socket: every request asks for its instance and every ended one is told; operators'
calls use it too, and the scheduler's orders to start and end instances come by it. If the
scheduler does not answer in time, requests go to the instance that runs fewest of this frontend's
own, so serving goes on without it. What was asked is asked again until it is answered, and the
registration is told every second: a scheduler that restarts knows nothing of either. Only an order
to migrate is given once: the second would be refused while the first is carried out.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import zmq
from vllm.v1.engine import EngineCoreRequest

from llumsched.core.types import SchedulingRequest, priority_class
from llumsched.engine.vllm.predicted_length import predict
from llumsched.frontend.request.hints import current
from llumsched.frontend.request.rejection import Rejected, allowed, reasoned
from llumsched.frontend.routing.sockets import LoopSocket
from llumsched.hints import SchedulingHints
from llumsched.logs import FailureLog
from llumsched.wire.control import (
    Accepted,
    ClusterDescription,
    DescribeCluster,
    DrainInstance,
    LaunchRefused,
    Message,
    MigrateAnswer,
    MigrateRequest,
    OrderLaunch,
    OrderReplacement,
    OrderTermination,
    Placed,
    PlaceRequest,
    RegisterFrontend,
    RequestEnded,
    RequestTraced,
    ScalePool,
    SentElsewhere,
    TraceRequest,
    Welcomed,
    decode_control,
    encode,
)
from llumsched.wire.keys import PoolKeys
from llumsched.wire.names import instance_name

logger = logging.getLogger(__name__)

# Kept for a scheduler that reads nothing; while it is away each waiting request asks every second.
MAX_UNSENT_MESSAGES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a frontend waits for its scheduler, in seconds."""

    # A scheduler that decides answers within a millisecond; one that holds a request says nothing
    # until it is placed. Whatever else it says meanwhile tells a held request from a dead
    # scheduler, and if that is nothing, a probe, which all held requests share.
    placement_s: float = 1.0
    probe_s: float = 1.0
    register_interval_s: float = 1.0
    # Another is up within seconds of its death. Without it and without an instance nobody decides
    # how long a request may wait.
    silent_s: float = 30.0
    # What is sent while a scheduler dies is lost.
    ask_again_s: float = 1.0


class SchedulerUnavailable(Exception):
    """The global scheduler does not answer."""


class Withdrawn(Exception):
    """The request was ended while it waited for its instance."""


class InstanceLauncher(Protocol):
    """Starts and ends instances; every call returns at once."""

    def launch(self, launch_id: str | None) -> None:
        """Start one more instance."""

    def replace(self, instance_id: str) -> None:
        """When this instance has ended, start another."""

    def terminate(self, instance_id: str) -> None:
        """End an instance, with whatever it still runs."""

    @property
    def num_replacing(self) -> int:
        """How many instances come in the place of others, unasked."""


class SchedulerClient:
    """Args:
    endpoint: the scheduler's control socket.
    keys: the pool's.
    least_loaded: chooses an instance when the scheduler is silent; ``None`` while there is none.
    prefix_hashes: names the blocks of a prompt, where the scheduler's policies want them.
    frontend_id: by which the scheduler knows this process; of two that run at a time no two are
        the same.
    """

    def __init__(
        self,
        endpoint: str,
        keys: PoolKeys,
        least_loaded: Callable[[], int | None],
        prefix_hashes: Callable[[EngineCoreRequest], tuple[int, ...]] | None = None,
        frontend_id: str = "frontend-0",
        patience: Patience = Patience(),
    ) -> None:
        self._patience = patience
        self._frontend_id = frontend_id
        self._least_loaded = least_loaded
        self._prefix_hashes = prefix_hashes
        self._supervisor: InstanceLauncher | None = None
        self._draining: set[str] = set()
        self._placements: dict[str, asyncio.Future[Placed]] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._given_once: dict[int, asyncio.Future[Any]] = {}
        self._scheduler_id: str | None = None
        self._heard_s = 0.0
        self._probing: asyncio.Task[bool] | None = None
        self._failures = FailureLog(logger)
        self._call_ids = itertools.count(1)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(MAX_UNSENT_MESSAGES)
        keys.connect_with(self._socket)
        self._socket.connect(endpoint)
        self._link = LoopSocket(self._socket, self._take_in)
        self._link.start()
        self._registering = asyncio.create_task(self._register())

    def supervise_with(self, supervisor: InstanceLauncher) -> None:
        """From now on the scheduler's orders to start and end instances are carried out here."""
        self._supervisor = supervisor

    async def place(
        self, request: EngineCoreRequest, *, lost: int | None = None, num_output_tokens: int = 0
    ) -> int:
        """The instance for a request, which takes the scheduler's prediction along.

        Args:
            lost: the instance that died with it.
            num_output_tokens: what its client has of it, so that its stream is finished if it can.

        Raises:
            Rejected: by the scheduler, or because neither it nor an instance is there; the message
                says why.
            Withdrawn: the request has ``ended`` meanwhile.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Placed] = loop.create_future()
        self._placements[request.request_id] = future
        try:
            prefix_hashes = self._prefix_hashes(request) if self._prefix_hashes else ()
            described = for_scheduling(request, current(), prefix_hashes, num_output_tokens)
            asked = PlaceRequest(
                request=described,
                lost=instance_name(lost) if lost is not None else None,
                has_begun=num_output_tokens > 0,
            )
            heard_s = loop.time()
            while True:
                asked_s = loop.time()
                self._send(asked)
                await asyncio.wait({future}, timeout=self._patience.placement_s)
                is_alive = future.done() or self._heard_s > asked_s or await self._is_alive()
                if future.done():
                    placed = future.result()
                    break
                if is_alive:
                    # A scheduler that was started again has never heard of the request.
                    heard_s = loop.time()
                    continue
                instance = self._least_loaded()
                if instance is not None:
                    self._failures.failed(
                        "silent",
                        "The global scheduler is silent; request %s goes to %s",
                        request.request_id,
                        instance_name(instance),
                        level=logging.WARNING,
                    )
                    reasoned("the scheduler is silent; fewest requests of this frontend")
                    # One that is only late has it where it would have placed it, or holds it.
                    self._send(
                        SentElsewhere(request=described, instance_id=instance_name(instance))
                    )
                    return instance
                if loop.time() - heard_s > self._patience.silent_s:
                    raise Rejected("the global scheduler is silent, and no instance is up", None)
        finally:
            self._placements.pop(request.request_id, None)
        if placed.allowance is not None:
            allowed(placed.allowance)
        if placed.instance_id is None or placed.engine_index is None:
            raise Rejected(placed.reason, placed.retry_after_s, placed.rejection)
        reasoned(placed.reason)
        if placed.predicted_output_tokens is not None and request.sampling_params is not None:
            predict(request.sampling_params, placed.predicted_output_tokens)
        return placed.engine_index

    def sent_elsewhere(self, request: EngineCoreRequest, instance: int) -> None:
        """Tell the scheduler that a request went to an instance that the frontend has chosen."""
        self._send(
            SentElsewhere(
                request=for_scheduling(request, current()), instance_id=instance_name(instance)
            )
        )

    def ended(
        self, request_id: str, *, aborted: bool, num_output_tokens: int | None = None
    ) -> None:
        placement = self._placements.get(request_id)
        if placement is not None and not placement.done():
            # The scheduler does not answer for what it has forgotten.
            placement.set_exception(Withdrawn(request_id))
            placement.exception()  # nobody may be left to hear of it
        self._send(
            RequestEnded(
                request_id=request_id, aborted=aborted, num_output_tokens=num_output_tokens
            )
        )

    async def migrate(
        self,
        request_id: str,
        destination: str | None,
        timeout_s: float,
        session_id: str | None = None,
    ) -> MigrateAnswer:
        """Have a request moved, or what a session has; returns when it has moved or could not."""
        call_id = next(self._call_ids)
        answer: MigrateAnswer = await self._call(
            call_id,
            MigrateRequest(
                call_id=call_id,
                request_id=request_id,
                destination=destination,
                session_id=session_id,
            ),
            timeout_s,
            ask_again=False,
        )
        return answer

    async def drain(self, instance_id: str, deadline_s: float | None, timeout_s: float) -> Accepted:
        """Have an instance emptied and ended; returns when the scheduler has begun."""
        call_id = next(self._call_ids)
        answer: Accepted = await self._call(
            call_id,
            DrainInstance(call_id=call_id, instance_id=instance_id, deadline_s=deadline_s),
            timeout_s,
        )
        if answer.refused is None:
            self._draining.add(instance_id)
        return answer

    def instance_gone(self, instance_id: str) -> None:
        """An instance has ended: there is nothing more to drain."""
        self._draining.discard(instance_id)

    async def scale(self, num_instances: int, timeout_s: float) -> Accepted:
        """Have this many instances; returns when the scheduler has begun."""
        call_id = next(self._call_ids)
        answer: Accepted = await self._call(
            call_id, ScalePool(call_id=call_id, num_instances=num_instances), timeout_s
        )
        return answer

    def launch_refused(self, launch_id: str, reason: str) -> None:
        """Tell the scheduler that an instance it ordered will not come."""
        self._send(LaunchRefused(launch_id=launch_id, reason=reason))

    async def describe(self, timeout_s: float) -> ClusterDescription:
        call_id = next(self._call_ids)
        answer: ClusterDescription = await self._call(
            call_id, DescribeCluster(call_id=call_id), timeout_s
        )
        return answer

    async def trace(self, request_id: str, timeout_s: float) -> RequestTraced:
        """The steps of a request; raises ``SchedulerUnavailable`` without an answer in time."""
        call_id = next(self._call_ids)
        asked = TraceRequest(call_id=call_id, request_id=request_id)
        answer: RequestTraced = await self._call(call_id, asked, timeout_s)
        return answer

    def close(self) -> None:
        self._link.stop()
        self._registering.cancel()
        if self._probing is not None:
            self._probing.cancel()
        self._socket.close(linger=0)
        self._context.term()

    async def _is_alive(self) -> bool:
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe())
        return await asyncio.shield(self._probing)

    async def _probe(self) -> bool:
        try:
            await self.describe(self._patience.probe_s)
        except SchedulerUnavailable:
            return False
        return True

    async def _call(
        self, call_id: int, message: Message, timeout_s: float, *, ask_again: bool = True
    ) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        if not ask_again:
            self._given_once[call_id] = future
        try:
            async with asyncio.timeout(timeout_s):
                self._send(message)
                while ask_again:
                    done, _ = await asyncio.wait({future}, timeout=self._patience.ask_again_s)
                    if done:
                        break
                    self._send(message)
                return await future
        except TimeoutError:
            raise SchedulerUnavailable(
                f"The global scheduler did not answer within {timeout_s:.0f} s."
            ) from None
        finally:
            self._calls.pop(call_id, None)
            self._given_once.pop(call_id, None)

    async def _register(self) -> None:
        while True:
            self._send(
                RegisterFrontend(
                    frontend_id=self._frontend_id,
                    supervises=self._supervisor is not None,
                    num_replacing=self._supervisor.num_replacing if self._supervisor else 0,
                    draining=tuple(sorted(self._draining)),
                )
            )
            await asyncio.sleep(self._patience.register_interval_s)

    def _send(self, message: Message) -> None:
        if self._socket.closed:
            return  # the frontend ends
        try:
            self._link.send(encode(message))
        except zmq.Again:
            # As what is sent while a scheduler dies; of what matters it learns in other ways.
            self._failures.warned("unsent", "The global scheduler reads nothing; a message is lost")

    def _welcomed(self, scheduler_id: str) -> None:
        if self._scheduler_id not in (None, scheduler_id):
            for call in self._given_once.values():
                if not call.done():
                    call.set_exception(
                        SchedulerUnavailable("The global scheduler was started again meanwhile.")
                    )
        self._scheduler_id = scheduler_id

    def _take_in(self, frames: list[zmq.Frame]) -> None:
        message = decode_control(frames[-1].buffer)
        self._heard_s = asyncio.get_running_loop().time()
        match message:
            case Placed():
                placement = self._placements.get(message.request_id)
                if placement is not None and not placement.done():
                    placement.set_result(message)
            case MigrateAnswer() | ClusterDescription() | Accepted() | RequestTraced():
                call = self._calls.get(message.call_id)
                if call is not None and not call.done():
                    call.set_result(message)
            case OrderLaunch() if self._supervisor is not None:
                self._supervisor.launch(message.launch_id)
            case OrderReplacement() if self._supervisor is not None:
                self._supervisor.replace(message.instance_id)
            case OrderTermination() if self._supervisor is not None:
                self._supervisor.terminate(message.instance_id)
            case Welcomed():
                self._welcomed(message.scheduler_id)
            case _:
                kind = type(message).__name__
                self._failures.warned(kind, "Dropped an unexpected %s", kind)


def for_scheduling(
    request: EngineCoreRequest,
    hints: SchedulingHints,
    prefix_hashes: tuple[int, ...] = (),
    num_output_tokens: int = 0,
) -> SchedulingRequest:
    """A request as the scheduler sees it; outputs it has had are computed like a prompt."""
    sampling = request.sampling_params
    prompt = request.prompt_token_ids
    priority = priority_class(request.priority)
    return SchedulingRequest(
        request_id=request.request_id,
        num_prompt_tokens=(len(prompt) if prompt is not None else 0) + num_output_tokens,
        max_output_tokens=sampling.max_tokens if sampling is not None else 1,
        scheduling_priority=priority,
        execution_priority=priority,
        client_id=hints.client_id,
        session_id=hints.session_id,
        prefix_hashes=prefix_hashes,
        ttft_slo_s=hints.ttft_slo_s,
        tpot_slo_s=hints.tpot_slo_s,
    )
