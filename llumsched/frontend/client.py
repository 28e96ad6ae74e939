"""vLLM's engine-core client, spread over the instances of the pool.

``AsyncLLM`` keeps its one client and never learns that there are many engines: this client
sends each request to the instance the scheduler chose, merges the outputs of all, and follows
requests that move. Tokens come straight from the instances; aborts go to whichever instance
runs the request now. What it overrides of ``AsyncMPClient`` is listed in
``llumsched.engine.vllm.internals``.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

import zmq
import zmq.asyncio
from vllm.config import VllmConfig
from vllm.utils.network_utils import make_zmq_socket
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
)
from vllm.v1.engine.core_client import (
    AsyncMPClient,
    BackgroundResources,
    _process_utility_output,
)
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from llumsched.core.types import priority_class, vllm_priority
from llumsched.engine.vllm.migration import HAND_OVER_CALL_ID
from llumsched.frontend.hints import current
from llumsched.frontend.metrics import FrontendMetrics
from llumsched.frontend.routes import Arrival, Finished, Passed, Route, Routes

logger = logging.getLogger(__name__)


class Placer(Protocol):
    """Chooses the instance of a request; the link to the global scheduler."""

    async def place(self, request: EngineCoreRequest) -> int:
        """The ZMQ index of the chosen instance; raises what the client should see as an error."""

    def ended(
        self, request_id: str, *, aborted: bool, num_output_tokens: int | None = None
    ) -> None:
        """Tell the scheduler that a request is over, and its length if it ended by itself."""


class FrontendSockets:
    """The two sockets all instances connect to; bound before any instance starts.

    Args:
        host: address to bind, loopback unless instances run on other machines.
    """

    def __init__(self, host: str) -> None:
        self.sync_context = zmq.Context(io_threads=2)
        self.context = zmq.asyncio.Context(self.sync_context)
        # A port of 0 is chosen by the system.
        self.input = self._bind(f"tcp://{host}:0", zmq.ROUTER)
        self.output = self._bind(f"tcp://{host}:0", zmq.PULL)

    def _bind(self, path: str, socket_type: int) -> zmq.asyncio.Socket:
        return cast(
            "zmq.asyncio.Socket", make_zmq_socket(self.context, path, socket_type, bind=True)
        )

    def addresses(self) -> EngineZmqAddresses:
        return EngineZmqAddresses(
            inputs=[self.input.get_string(zmq.LAST_ENDPOINT)],
            outputs=[self.output.get_string(zmq.LAST_ENDPOINT)],
        )

    def close(self) -> None:
        self.input.close(linger=0)
        self.output.close(linger=0)
        self.sync_context.term()


def engine_identity(engine_index: int) -> bytes:
    """The ZMQ identity vLLM gives the engine of this index."""
    return engine_index.to_bytes(2, "little")


class RoutingEngineClient(AsyncMPClient):
    """An ``AsyncMPClient`` over many engines that its own frontend did not start.

    Args:
        vllm_config: the configuration every instance shares.
        sockets: bound already; every instance must have been told their addresses.
        engine_indices: the instances to wait for, each once.
        placer: chooses the instance of every new request.
        ready_timeout_s: how long to wait for an instance's first message.

    Raises:
        TimeoutError: if an instance does not report in time.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        *,
        sockets: FrontendSockets,
        engine_indices: Sequence[int],
        placer: Placer,
        renderer: Any = None,
        client_index: int = 0,
        client_count: int = 1,
        ready_timeout_s: float = 60.0,
        metrics: FrontendMetrics | None = None,
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
        self._finalizer = weakref.finalize(self, self.resources)

        self._metrics = metrics if metrics is not None else FrontendMetrics()
        self.routes = Routes(observer=self._metrics)
        self._aborts: set[asyncio.Future[None]] = set()
        self._placer = placer
        self.engine_ranks_managed = list(engine_indices)
        self.core_engines = [engine_identity(index) for index in engine_indices]
        self.core_engine = self.core_engines[0]
        self._start_mm_warmup()
        self._await_ready(set(self.core_engines), ready_timeout_s)
        try:
            asyncio.get_running_loop()
            self._ensure_output_queue_task()
        except RuntimeError:
            pass  # started by the first request

    def _await_ready(self, identities: set[bytes], timeout_s: float) -> None:
        socket: zmq.Socket[bytes] = zmq.Socket.shadow(self.input_socket)
        while identities:
            if not socket.poll(timeout=int(timeout_s * 1000)):
                missing = sorted(int.from_bytes(identity, "little") for identity in identities)
                raise TimeoutError(
                    f"Instances {missing} did not reach the frontend within {timeout_s:.0f} s."
                )
            identity, payload = socket.recv_multipart()
            identities.discard(identity)
            self._apply_ready_response(payload)

    # ---- requests -------------------------------------------------------------------------

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        request.client_index = self.client_index
        priority = current().priority
        if priority is not None:
            request.priority = vllm_priority(priority)
        request_id = request.request_id
        self._ensure_output_queue_task()
        route = self.routes.open(
            request_id,
            request.external_req_id,
            priority_class=priority_class(request.priority),
            opened_s=time.monotonic(),
        )
        try:
            instance = await self._placer.place(request)
        except Exception:
            self._end(request_id, "rejected")
            raise
        except BaseException:
            self._end(request_id, "aborted")
            raise
        self._metrics.placement_s.observe(time.monotonic() - route.opened_s)
        if self.routes.get(request_id) is not route:
            return  # aborted while the scheduler was choosing
        route.instance = instance
        await self._send_input(EngineCoreRequestType.ADD, request, engine_identity(instance))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        by_instance: dict[int, list[str]] = {}
        for request_id in request_ids:
            route = self._end(request_id, "aborted")
            if route is None:
                continue
            for instance in self.routes.holders(route):
                by_instance.setdefault(instance, []).append(request_id)
        for instance, ids in by_instance.items():
            await self._abort_at(instance, ids)

    def _end(self, request_id: str, outcome: str) -> Route | None:
        """Stop following a request that did not finish by itself, and say so."""
        route = self.routes.close(request_id)
        if route is not None:
            self._placer.ended(request_id, aborted=True)
            self._metrics.ended(route, outcome)
        return route

    def _abort_soon(self, instance: int, request_id: str) -> None:
        abort = asyncio.ensure_future(self._abort_at(instance, [request_id]))
        self._aborts.add(abort)
        abort.add_done_callback(self._aborts.discard)

    async def _abort_at(self, instance: int, request_ids: list[str]) -> None:
        if instance in self.engine_ranks_managed and not self.resources.engine_dead:
            await self._send_input(
                EngineCoreRequestType.ABORT, request_ids, engine_identity(instance)
            )

    async def call_utility_async(self, method: str, *args: Any) -> Any:
        """Call a method of every instance's engine core; the first one's result."""
        return (await self.call_utility_all_async(method, *args))[0]

    # ---- outputs --------------------------------------------------------------------------

    def _ensure_output_queue_task(self) -> None:
        if self.resources.output_queue_task is not None:
            return
        socket = self._output_socket
        decoder, queue, resources = self.decoder, self.outputs_queue, self.resources
        self_ref = weakref.ref(self)

        async def receive_outputs() -> None:
            try:
                while True:
                    frames = await socket.recv_multipart(copy=False)
                    resources.validate_alive(frames)
                    outputs = decoder.decode(frames)
                    client = self_ref()
                    if client is None:
                        return
                    client._take_in(outputs)
                    del client
            except asyncio.CancelledError:
                raise
            except Exception as error:
                queue.put_nowait(error)

        resources.output_queue_task = asyncio.create_task(
            receive_outputs(), name="EngineCoreOutputQueueTask"
        )

    def _take_in(self, outputs: EngineCoreOutputs) -> None:
        utility = outputs.utility_output
        if utility is not None:
            if utility.call_id == HAND_OVER_CALL_ID:
                assert utility.result is not None
                self._take_in_hand_over(outputs.engine_index, utility.result.result)
            else:
                _process_utility_output(utility, self.utility_results)
            return
        passed, finished = self.routes.pass_on(outputs.engine_index, outputs.outputs)
        own = passed[0].outputs if passed and passed[0].instance == outputs.engine_index else []
        if len(own) != len(outputs.outputs):
            outputs.outputs = cast("list[EngineCoreOutput]", list(own))
        if outputs.outputs or outputs.scheduler_stats:
            self.outputs_queue.put_nowait(outputs)
        self._deliver(passed[1:] if own else passed, finished)

    def _take_in_hand_over(self, instance: int, announcement: Sequence[Any]) -> None:
        request_id, num_moves, num_tokens = announcement
        passed, finished, wanted = self.routes.arrive(
            request_id, Arrival(instance, num_moves, num_tokens)
        )
        if not wanted:
            # Its client left while it moved: no instance that knew of the abort runs it.
            self._abort_soon(instance, request_id)
            return
        self._deliver(passed, finished)

    def _deliver(self, passed: Iterable[Passed], finished: Iterable[Finished]) -> None:
        for part in passed:
            self.outputs_queue.put_nowait(
                EngineCoreOutputs(
                    engine_index=part.instance,
                    outputs=cast("list[EngineCoreOutput]", list(part.outputs)),
                )
            )
        for request in finished:
            self._placer.ended(
                request.request_id, aborted=False, num_output_tokens=request.num_tokens
            )

    # ---- instances ------------------------------------------------------------------------

    def instance_lost(self, instance: int) -> None:
        """End every request of a dead instance with an error; without any left, the engine is
        dead to ``AsyncLLM`` as well."""
        if instance not in self.engine_ranks_managed:
            return
        self.engine_ranks_managed = [i for i in self.engine_ranks_managed if i != instance]
        self.core_engines = [engine_identity(i) for i in self.engine_ranks_managed]
        failed = []
        for request_id, route in self.routes:
            holders = self.routes.holders(route)
            if instance in holders:
                self._end(request_id, "instance_lost")
                # It may also be on its way to or from another instance.
                for other in holders - {instance}:
                    self._abort_soon(other, request_id)
                failed.append(
                    EngineCoreOutput(
                        request_id=request_id, new_token_ids=[], finish_reason=FinishReason.ERROR
                    )
                )
        self._metrics.lost_instances.inc()
        logger.error("Instance %d is lost, and %d requests with it.", instance, len(failed))
        if failed:
            self.outputs_queue.put_nowait(EngineCoreOutputs(engine_index=instance, outputs=failed))
        if self.core_engines:
            self.core_engine = self.core_engines[0]
        else:
            self.resources.engine_dead = True
            self.outputs_queue.put_nowait(self._format_exception(RuntimeError("no instance left")))
