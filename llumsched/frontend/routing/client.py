"""vLLM's engine-core client, spread over the instances of the pool.

``AsyncLLM`` keeps its one client and never learns that there are many engines: this client
sends each request to the instance the scheduler chose, merges the outputs of all, and follows
requests that move. Tokens come straight from the instances; aborts go to whichever instance
runs the request now; requests of an instance that is lost go on elsewhere (``resumer``). What it
overrides of ``AsyncMPClient`` is listed in ``llumsched.engine.vllm.internals``.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

import zmq
from vllm.config import VllmConfig
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.core_client import (
    _process_utility_output,
)

from llumsched.core.types import priority_class, vllm_priority
from llumsched.engine.vllm.compat import is_retryable
from llumsched.engine.vllm.migration import HAND_OVER_CALL_ID
from llumsched.frontend.request import rejection as overload
from llumsched.frontend.request.hints import current
from llumsched.frontend.routing import resumer
from llumsched.frontend.routing.connections import ConnectedInstances, Roster
from llumsched.frontend.routing.lost_requests import LostRequestDetector
from llumsched.frontend.routing.request_metrics import FrontendMetrics
from llumsched.frontend.routing.resumer import Resumer
from llumsched.frontend.routing.routes import Arrival, Finished, Passed, Route, Routes
from llumsched.frontend.routing.scheduler_client import Withdrawn
from llumsched.frontend.routing.sockets import FrontendSockets, LoopSocket
from llumsched.logs import counted
from llumsched.wire.names import instance_name

logger = logging.getLogger(__name__)


class Placer(resumer.Placer, Protocol):
    """Chooses the instance of a request, and hears of its end; the link to the scheduler."""

    def sent_elsewhere(self, request: EngineCoreRequest, instance: int) -> None:
        """Tell the scheduler that a request went to an instance that it has not chosen."""

    def ended(
        self, request_id: str, *, aborted: bool, num_output_tokens: int | None = None
    ) -> None:
        """Tell the scheduler that a request is over, and its length if it ended by itself."""


class RoutingEngineClient(ConnectedInstances):
    """Requests and their outputs, over instances that come and go.

    Args:
        vllm_config: the configuration every instance shares.
        sockets: bound already; every instance must have been told their addresses.
        placer: chooses the instance of every new request.
        roster: as for ``ConnectedInstances``.
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
        placer: Placer,
        renderer: Any = None,
        client_index: int = 0,
        client_count: int = 1,
        roster: Roster,
        num_labels: int = 1,
        ready_timeout_s: float = 60.0,
        metrics: FrontendMetrics | None = None,
    ) -> None:
        self._receiver: LoopSocket | None = None
        self._metrics = metrics if metrics is not None else FrontendMetrics()
        self.routes = Routes(observer=self._metrics)
        self._placer = placer
        self._resumer = Resumer(self.routes, placer, self, self._give_up)
        super().__init__(
            vllm_config,
            sockets=sockets,
            renderer=renderer,
            client_index=client_index,
            client_count=client_count,
            roster=roster,
            num_labels=num_labels,
            ready_timeout_s=ready_timeout_s,
        )
        try:
            asyncio.get_running_loop()
            self._ensure_output_queue_task()
        except RuntimeError:
            pass  # started by the first request

    def shutdown(self, timeout: float | None = None) -> None:
        if self._receiver is not None:
            self._receiver.stop()
        super().shutdown(timeout)

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
            num_prompt_tokens=len(request.prompt_token_ids or ()),
        )
        self._metrics.opened(route, request)
        self._resumer.keep(request)
        try:
            instance = await self._place(request)
            overload.placed(route)
            self._metrics.placed(route)
            if self.routes.get(request_id) is not route:
                return  # aborted as the scheduler answered
            route.instance = instance
            await self.add(instance, request)
        except Withdrawn:
            return  # aborted while the scheduler was choosing
        except BaseException as error:
            if isinstance(error, overload.Rejected):
                overload.turned_away(error)
            # Nobody waits for it any more, nor aborts it.
            if self.routes.get(request_id) is route:
                self._drop(request_id, "rejected" if isinstance(error, Exception) else "aborted")
            raise

    async def _place(self, request: EngineCoreRequest) -> int:
        lost: int | None = None
        while True:
            instance = await self._placer.place(request, lost=lost)
            if self.is_up(instance):
                return instance
            # The scheduler answers no more for what it is told lost until it knows of that loss.
            lost = instance if self.is_gone(instance) else None
            await asyncio.sleep(resumer.UNKNOWN_INSTANCE_DELAY_S)

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
        self._resumer.forget(request_id)
        if route is not None:
            self._placer.ended(request_id, aborted=True)
            self._metrics.ended(route, outcome)
        return route

    def _drop(self, request_id: str, outcome: str) -> bool:
        """``_end`` a request also at the instances that may run it; whether it was followed."""
        route = self._end(request_id, outcome)
        if route is None:
            return False
        for instance in self.routes.holders(route):
            self.abort_soon(instance, request_id)
        return True

    def _give_up(self, request_id: str, reason: str) -> None:
        """End a request with an error."""
        logger.error(
            "Request %s ends with an error: %s",
            request_id,
            reason,
            extra={"request_id": request_id},
        )
        if not self._drop(request_id, "instance_lost"):
            return
        self.outputs_queue.put_nowait(
            EngineCoreOutputs(
                outputs=[
                    EngineCoreOutput(
                        request_id=request_id, new_token_ids=[], finish_reason=FinishReason.ERROR
                    )
                ]
            )
        )

    # ---- outputs --------------------------------------------------------------------------

    def _ensure_output_queue_task(self) -> None:
        if self.resources.output_queue_task is not None:
            return
        decoder, queue = self.decoder, self.outputs_queue
        self_ref = weakref.ref(self)

        def take_in(frames: list[zmq.Frame]) -> None:
            client = self_ref()
            if client is None:
                receiver.stop()
                return
            try:
                outputs = decoder.decode(frames)
                client._outputs.heard(outputs.engine_index, frames[0])
                client._take_in(outputs)
            except Exception as error:
                receiver.stop()
                queue.put_nowait(error)

        receiver = self._receiver = LoopSocket(zmq.Socket.shadow(self._output_socket), take_in)

        async def receive_outputs() -> None:
            receiver.start()
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                receiver.stop()

        self.resources.output_queue_task = asyncio.create_task(
            receive_outputs(), name="EngineCoreOutputQueueTask"
        )
        self._spawn(self._receive_ready())
        self._spawn(self._greet())
        self._spawn(self._inputs.run())
        self._spawn(self._outputs.run())
        self._spawn(LostRequestDetector(self.routes, self, self._found_missing).run())

    def _take_in(self, outputs: EngineCoreOutputs) -> None:
        if outputs.engine_index in self._unheard:
            return
        utility = outputs.utility_output
        if utility is not None:
            if utility.call_id == HAND_OVER_CALL_ID:
                assert utility.result is not None
                self._take_in_hand_over(outputs.engine_index, utility.result.result)
            elif utility.call_id in self.utility_results:
                _process_utility_output(utility, self.utility_results)
            # Else it was asked by a frontend that died in this one's place.
            return
        instance = outputs.engine_index
        label = self.labels.of(instance)
        if label is None:
            return  # it is dead, and what it ran goes on elsewhere
        taken = [
            output
            for output in outputs.outputs
            if output.finish_reason != FinishReason.ERROR
            or not self._goes_elsewhere(instance, output)
        ]
        passed, finished = self.routes.pass_on(instance, taken)
        own = passed[0].outputs if passed and passed[0].instance == instance else []
        if len(own) != len(outputs.outputs):
            outputs.outputs = cast("list[EngineCoreOutput]", list(own))
        if outputs.outputs or outputs.scheduler_stats:
            outputs.engine_index = label
            self.outputs_queue.put_nowait(outputs)
        self._deliver(passed[1:] if own else passed, finished)

    def _goes_elsewhere(self, instance: int, output: EngineCoreOutput) -> bool:
        """True if a paused engine has not taken the request, and another instance is asked instead.

        When all have been asked, the client gets the answer of the last, which says to try again.
        """
        if not is_retryable(output):
            return False
        route, request = self.routes.get(output.request_id), self._resumer.kept(output.request_id)
        if route is None or request is None or route.instance != instance or route.num_tokens:
            return False
        route.rejected_by.add(instance)
        others = [other for other in self.instances if other not in route.rejected_by]
        if not others:
            return False
        route.instance = min(others, key=self.routes.num_requests)
        self._placer.sent_elsewhere(request, route.instance)
        self._spawn(self.add(route.instance, request))
        return True

    def _take_in_hand_over(self, instance: int, announcement: Sequence[Any]) -> None:
        request_id, placement_number, num_tokens = announcement
        arrival = Arrival(instance, placement_number, num_tokens)
        if not self.is_up(instance):
            if self.routes.was_to_follow(request_id, arrival):
                self._found_missing([request_id], instance)
            return
        passed, finished, wanted = self.routes.arrive(request_id, arrival)
        if not wanted:
            # Its client left while it moved, or it was resumed from before that.
            self.abort_soon(instance, request_id)
            return
        self._deliver(passed, finished)

    def _deliver(self, passed: Iterable[Passed], finished: Iterable[Finished]) -> None:
        for part in passed:
            self.outputs_queue.put_nowait(
                EngineCoreOutputs(
                    engine_index=self.labels.of(part.instance) or 0,
                    outputs=cast("list[EngineCoreOutput]", list(part.outputs)),
                )
            )
        for request in finished:
            self._resumer.forget(request.request_id)
            self._placer.ended(
                request.request_id, aborted=False, num_output_tokens=request.num_tokens
            )

    # ---- instances ------------------------------------------------------------------------

    async def begin_anew(self) -> None:
        """End whatever the frontend that was here before has left at the instances."""
        for request_ids in await self.call_utility_all_async("abort_client", self.client_index):
            for request_id in request_ids:
                self._placer.ended(request_id, aborted=True)

    def least_loaded(self) -> int | None:
        """The instance that has the fewest of this frontend's own requests."""
        return min(self.instances, key=self.routes.num_requests, default=None)

    def instance_lost(
        self, instance: int, *, expected: bool = False, is_counted: bool = True
    ) -> None:
        """An instance is dead, or was ended: what it had goes on elsewhere.

        Args:
            is_counted: whether it is counted here, and not by another frontend.
        """
        if not self._disconnect(instance):
            return
        lost = self.routes.lose(instance)
        if is_counted and not expected:
            self._metrics.lost_instances.inc()
        if lost or not expected:
            log = logger.info if expected else logger.warning
            name = instance_name(instance)
            log(
                "%s is gone; %s of it to go on elsewhere",
                name,
                counted(len(lost), "request"),
                extra={"instance_id": name},
            )
        self._metrics.resumptions.inc(len(lost))
        self._resumer.resume(lost, instance)

    def _found_missing(self, request_ids: Sequence[str], instance: int) -> None:
        """Requests that their instance does not have, or that went to one that is dead."""
        for request_id in request_ids:
            route = self.routes.get(request_id)
            if route is not None:
                self.routes.begin_again(route)
        self._metrics.resumptions.inc(len(request_ids))
        self._resumer.resume(request_ids, None if self.is_up(instance) else instance)
