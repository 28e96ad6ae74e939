"""vLLM's engine-core client, connected to instances that it did not start.

An instance is up from its first message until it is told gone; what it was asked and has not
answered then fails. Which of them runs which request is not known here (``client``).
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any, Protocol, cast

import zmq
import zmq.asyncio
from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources, EngineIdentity
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from llumsched.engine.vllm.reconnect_probe import RECONNECT_PROBE
from llumsched.frontend.routing.disconnects import BrokenConnections
from llumsched.frontend.routing.engine_labels import EngineLabels
from llumsched.frontend.routing.pending_calls import PendingCalls
from llumsched.frontend.routing.sockets import FrontendSockets, engine_identity
from llumsched.wire.names import instance_name

logger = logging.getLogger(__name__)

GREETING_INTERVAL_S = 0.1


class Roster(Protocol):
    """Which instances there are, as whoever starts them says."""

    def labels(self) -> Mapping[int, int]:
        """Serving instances, each with its label in vLLM's metrics; from any thread."""


class NoInstance(GracefulHTTPError, ConnectionError):
    """There is nobody to ask; vLLM's server answers with 503 and the reason."""

    def __init__(self) -> None:
        super().__init__("No instance is up.", HTTPStatus.SERVICE_UNAVAILABLE)


class ConnectedInstances(AsyncMPClient):
    """An ``AsyncMPClient`` over many engines that its own frontend did not start.

    Args:
        vllm_config: the configuration every instance shares.
        sockets: bound already; every instance must have been told their addresses.
        roster: the instances there are, as the launcher tells. The frontend makes itself known to
            them, and takes nobody else for an instance.
        num_labels: labels of instances in vLLM's metrics.
        ready_timeout_s: how long to wait for an instance's first message.

    Raises:
        TimeoutError: if an instance does not report in time.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        *,
        sockets: FrontendSockets,
        renderer: Any,
        client_index: int,
        client_count: int,
        roster: Roster,
        num_labels: int,
        ready_timeout_s: float,
    ) -> None:
        # Not AsyncMPClient.__init__, which derives its engines from the data-parallel size and
        # may start them; the fields it would set are set here.
        self.vllm_config = vllm_config
        self._renderer = renderer
        self._effective_attention_block_sizes: set[int | None] = set()
        self._kv_event_sources: dict[int, Any] = {}
        self._engine_status: dict[int, dict[str, Any]] = {}
        self.engines_running = False
        self.stats_update_address = None
        # No data-parallel coordinator: engines name none.
        self.coordinator_input_address = self.coordinator_output_address = None
        self.client_index = client_index
        self.client_count = client_count
        self.utility_results: dict[int, Any] = {}
        self.outputs_queue: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()
        self.encoder = MsgpackEncoder()
        self.decoder = MsgpackDecoder(EngineCoreOutputs)

        self.ctx = sockets.context
        self.input_socket = sockets.input
        self._output_socket = sockets.output
        self.resources = BackgroundResources(ctx=sockets.sync_context)
        self.resources.input_socket = sockets.input
        self.resources.output_socket = sockets.output
        self._gate = sockets.gate
        self._finalizer = weakref.finalize(self, self.resources)

        self._tasks: set[asyncio.Future[None]] = set()
        self._gone: set[int] = set()
        self._roster = roster
        self._roster_changed = asyncio.Event()
        self.labels = EngineLabels(num_labels)
        self._calls = PendingCalls()
        self._unheard: set[int] = set()
        self._connection_broke: Callable[[int], None] | None = None
        self._inputs, self._outputs = (
            BrokenConnections(socket, self._broken, sockets.gate.count)
            for socket in (sockets.input, sockets.output)
        )
        # AsyncLLM reads these once, for its metrics.
        self.engine_ranks_managed = self.labels.all
        self.core_engines: list[EngineIdentity] = []
        self._start_mm_warmup()
        self._await_ready(ready_timeout_s)

    def shutdown(self, timeout: float | None = None) -> None:
        for task in self._tasks:
            task.cancel()
        self._gate.close()
        super().shutdown(timeout)

    # ---- coming and going -----------------------------------------------------------------

    def _await_ready(self, timeout_s: float) -> None:
        socket: zmq.Socket[bytes] = zmq.Socket.shadow(self.input_socket)
        deadline_s = time.monotonic() + timeout_s
        while missing := self._missing():
            if time.monotonic() > deadline_s:
                raise TimeoutError(
                    f"Instances {sorted(missing)} did not reach the frontend within "
                    f"{timeout_s:.0f} s."
                )
            for index in missing:
                socket.send_multipart([engine_identity(index), RECONNECT_PROBE])
            if socket.poll(timeout=int(1000 * GREETING_INTERVAL_S)):
                identity, payload = socket.recv_multipart(copy=False)
                if self._heard_ready(identity):
                    self._apply_ready_response(payload.bytes)

    async def _receive_ready(self) -> None:
        while True:
            received = cast(Any, self.input_socket.recv_multipart(copy=False))
            identity, response = cast("list[zmq.Frame]", await received)
            if self._heard_ready(identity):
                index = int.from_bytes(identity.bytes, "little")
                logger.info("%s is connected", instance_name(index))
                if not self._effective_attention_block_sizes:
                    # The first of all: what it found out on booting is true of each.
                    self._apply_ready_response(response.bytes)

    async def _greet(self) -> None:
        """Make this frontend known to instances that have not heard of it, until cancelled."""
        while True:
            for index in self._missing():
                await cast(
                    Any, self.input_socket.send_multipart([engine_identity(index), RECONNECT_PROBE])
                )
            if self._missing():
                await asyncio.sleep(GREETING_INTERVAL_S)
            else:
                self._roster_changed.clear()
                await self._roster_changed.wait()

    def roster_changed(self) -> None:
        """The roster may name instances that it did not; call on the loop."""
        self._roster_changed.set()

    def _missing(self) -> set[int]:
        """Engine indices on the roster whose instances have not come."""
        return set(self._roster.labels()) - set(self.instances) - self._gone

    def _heard_ready(self, identity: zmq.Frame) -> bool:
        """Take in that an instance is ready; whether it has come by that."""
        index = int.from_bytes(identity.bytes, "little")
        self._inputs.heard(index, identity)
        if index in self._gone or self.is_up(index):
            return False
        label = self._roster.labels().get(index)
        if label is None:
            return False  # it is greeted once it is on the roster
        self.labels.take(index, label)
        self._list_engines()
        return True

    def _list_engines(self) -> None:
        self.core_engines = [engine_identity(index) for index in self.instances]
        if self.core_engines:
            self.core_engine = self.core_engines[0]

    def tell_of_breaks(self, connection_broke: Callable[[int], None]) -> None:
        """From now on this hears of every instance whose connection has broken."""
        self._connection_broke = connection_broke

    def _broken(self, instance: int) -> None:
        if not self.is_up(instance):
            return
        # Tokens may be missing before what still comes.
        self._unheard.add(instance)
        if self._connection_broke is not None:
            self._connection_broke(instance)

    def _disconnect(self, instance: int) -> bool:
        """An instance is gone; whether it was up."""
        self._gone.add(instance)
        self._unheard.discard(instance)
        if not self.is_up(instance):
            return False
        self.labels.give_back(instance)
        self._list_engines()
        self._calls.died(instance)
        return True

    # ---- what instances are asked ---------------------------------------------------------

    def is_up(self, instance: int) -> bool:
        return self.labels.of(instance) is not None

    def is_gone(self, instance: int) -> bool:
        """True if the instance was reported lost: one not up may also be about to connect."""
        return instance in self._gone

    @property
    def instances(self) -> list[int]:
        """Instances that are up."""
        return self.labels.instances

    async def add(self, instance: int, request: EngineCoreRequest) -> None:
        await self._send_input(EngineCoreRequestType.ADD, request, engine_identity(instance))

    async def resume(self, instance: int, state: bytes) -> str | None:
        try:
            refused: str | None = await self._ask(instance, "resume_request", state)
        except ConnectionError:
            raise
        except Exception as error:  # vLLM has no better one for a call that failed over there
            raise ConnectionError(f"instance {instance} does not take it: {error}") from error
        return refused

    async def missing(self, instance: int, request_ids: list[str]) -> list[str]:
        """The requests that the instance does not have."""
        missing: list[str] = await self._ask(instance, "missing_requests", request_ids)
        return missing

    def abort_soon(self, instance: int, request_id: str) -> None:
        self._spawn(self._abort_at(instance, [request_id]))

    async def _abort_at(self, instance: int, request_ids: list[str]) -> None:
        if self.is_up(instance):
            await self._send_input(
                EngineCoreRequestType.ABORT, request_ids, engine_identity(instance)
            )

    async def _ask(self, instance: int, method: str, *args: Any) -> Any:
        """Call a method of one instance's engine core.

        Raises:
            ConnectionError: if the instance dies before it answers.
        """
        return await self._calls.answer(
            instance, self._call_utility_async(method, *args, engine=engine_identity(instance))
        )

    async def call_utility_async(self, method: str, *args: Any) -> Any:
        """Call a method of every instance's engine core; the first one's result."""
        return (await self.call_utility_all_async(method, *args))[0]

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every instance's engine core; those that die meanwhile are left out.

        Raises:
            NoInstance: if there is none, or all die.
        """
        results = await asyncio.gather(
            *(self._ask(instance, method, *args) for instance in self.instances),
            return_exceptions=True,
        )
        answers = [result for result in results if not isinstance(result, ConnectionError)]
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        if not answers:
            raise NoInstance()
        return answers

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Future[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("A task of the frontend failed", exc_info=task.exception())
