"""The scheduler of one model, in the proxy's own event loop.

The decisions are the core's; this gives it the time, turns what happens to servers and requests
into its events, and completes what waits for its actions. Nothing here blocks. Requests cannot move
between plain servers, and nobody here starts one: the bundle's migration and scaling are left out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable

from llumsched.config import Config, build_bundle
from llumsched.core.actions import (
    Action,
    DispatchRequest,
    LaunchInstance,
    PolicyFailed,
    Rejection,
    RejectRequest,
    TerminateInstance,
)
from llumsched.core.events import (
    DrainRequested,
    Event,
    InstanceJoined,
    InstanceLost,
    KvBlocksRemoved,
    KvBlocksStored,
    LaunchFailed,
    LoadReported,
    RequestAborted,
    RequestArrived,
    RequestFinished,
    Ticked,
)
from llumsched.core.load import InstanceLoad, InstanceSpec
from llumsched.core.policy import PolicyBundle
from llumsched.core.scheduling.scheduler import GlobalScheduler
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import SchedulingRequest
from llumsched.logs import FailureLog
from llumsched.policy_failures import log_failure

logger = logging.getLogger(__name__)

NO_LAUNCH = "a proxy starts no servers; add one with POST /llumsched/backends"


class TurnedAway(Exception):
    """The scheduler rejects a request."""

    def __init__(self, action: RejectRequest) -> None:
        super().__init__(action.reason)
        self.rejection: Rejection = action.rejection
        self.retry_after_s = action.retry_after_s
        self.allowance = action.allowance


def bundle_of(config: Config) -> PolicyBundle:
    """The policies of a pool of plain servers."""
    return dataclasses.replace(build_bundle(config), migration=None, scaling=None)


class ModelPool:
    """See the module docstring.

    Args:
        config: the policy and the scheduler's options.
        leave: called with a server's id when it has been drained.
        policy_failed: called with the name of a policy that raised or answered nonsense.
        clock: seconds that only ever grow.
    """

    def __init__(
        self,
        config: Config,
        leave: Callable[[str], None],
        policy_failed: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        bundle = bundle_of(config)
        self.policy = bundle.name
        # Nothing moves, of idle sessions neither.
        options = dataclasses.replace(bundle.options, move_idle_sessions=False)
        self._scheduler = GlobalScheduler(bundle, options, seed=config.seed)
        self._leave = leave
        self._policy_failed = policy_failed
        self._clock = clock
        self._waiting: dict[str, asyncio.Future[DispatchRequest]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._failures = FailureLog(logger)
        self.server_ids: set[str] = set()

    async def place(
        self, request: SchedulingRequest, *, is_admitted: bool = False
    ) -> DispatchRequest:
        """The server for a request, when there is one.

        Args:
            is_admitted: another try of a request that was; it is not judged, nor charged, again.

        Raises:
            TurnedAway: the scheduler rejects it.
        """
        future: asyncio.Future[DispatchRequest] = asyncio.get_running_loop().create_future()
        self._waiting[request.request_id] = future
        try:
            self._handle(RequestArrived(request=request, has_begun=is_admitted))
            return await future
        except asyncio.CancelledError:
            self.aborted(request.request_id)
            raise
        finally:
            self._waiting.pop(request.request_id, None)

    def finished(self, request_id: str, num_output_tokens: int | None) -> None:
        """A request has its answer."""
        self._handle(RequestFinished(request_id=request_id, num_output_tokens=num_output_tokens))

    def aborted(self, request_id: str) -> None:
        """A request's client has left, or its server failed it."""
        self._handle(RequestAborted(request_id=request_id))

    def join(self, spec: InstanceSpec) -> None:
        """A server serves this model."""
        if spec.instance_id not in self.server_ids:
            self.server_ids.add(spec.instance_id)
            self._handle(InstanceJoined(spec=spec))

    def lose(self, server_id: str, reason: str) -> None:
        """A server does not serve this model any more."""
        if server_id in self.server_ids:
            self.server_ids.remove(server_id)
            self._handle(InstanceLost(instance_id=server_id, reason=reason))

    def report(self, load: InstanceLoad) -> None:
        """The load of a server."""
        if load.instance_id in self.server_ids:
            self._handle(LoadReported(load=load))

    def computes(self, server_id: str, new: tuple[int, ...]) -> None:
        """A server has these prefix blocks now."""
        if new:
            self._handle(KvBlocksStored(instance_id=server_id, block_hashes=new))

    def drops(self, server_id: str, names: tuple[int, ...]) -> None:
        """A server has these prefix blocks, of whichever model, no more."""
        if server_id in self.server_ids:
            self._handle(KvBlocksRemoved(instance_id=server_id, block_hashes=names))

    def drain(self, server_id: str, deadline_s: float | None) -> None:
        """Send a server nothing new, and let it leave when it is empty, or after this long."""
        if server_id in self.server_ids:
            self._handle(DrainRequested(instance_id=server_id, deadline_s=deadline_s))

    def snapshot(self) -> ClusterSnapshot:
        """The servers as policies see them."""
        return self._scheduler.snapshot(self._clock())

    @property
    def num_held_by_class(self) -> dict[int, int]:
        """Requests that wait here for a server, by priority class."""
        return self._scheduler.num_queued_by_class()

    def close(self) -> None:
        """End the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _handle(self, event: Event) -> None:
        for action in self._scheduler.handle(event, self._clock()):
            self._carry_out(action)
        self._set_timer()

    def _carry_out(self, action: Action) -> None:
        match action:
            case DispatchRequest():
                waiting = self._waiting.get(action.request_id)
                if waiting is None or waiting.done():
                    # Its server was lost in the middle of the answer, which its own handler ends.
                    self._soon(RequestAborted(request_id=action.request_id))
                else:
                    waiting.set_result(action)
            case RejectRequest():
                waiting = self._waiting.get(action.request_id)
                if waiting is not None and not waiting.done():
                    waiting.set_exception(TurnedAway(action))
            case LaunchInstance():
                self._soon(LaunchFailed(launch_id=action.launch_id, reason=NO_LAUNCH))
            case TerminateInstance():
                self.server_ids.discard(action.instance_id)
                self._soon(InstanceLost(instance_id=action.instance_id, reason=action.reason))
                self._leave(action.instance_id)
            case PolicyFailed():
                log_failure(self._failures, action)
                self._policy_failed(action.policy)

    def _soon(self, event: Event) -> None:
        asyncio.get_running_loop().call_soon(self._handle, event)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline_s = self._scheduler.next_deadline()
        if deadline_s is not None:
            wait_s = max(0.0, deadline_s - self._clock())
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._handle, Ticked())
