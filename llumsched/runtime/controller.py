"""The global scheduler's host: messages in, events to the core, actions out as messages.

All decisions are the core's (``GlobalScheduler``); this turns what arrives on one socket into
events, gives the core the time, and sends what the core answers. Nothing in its loop waits for
anything but the next message or the core's next deadline. It runs as a named Ray actor, with
no state that could not be learned again from the instances.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from llumsched.config import Config
from llumsched.core.actions import (
    Action,
    DispatchRequest,
    LaunchInstance,
    PolicyFailed,
    RefuseMigration,
    RejectRequest,
    StartMigration,
    TerminateInstance,
)
from llumsched.core.events import (
    Event,
    InstanceJoined,
    InstanceLost,
    LaunchFailed,
    LoadReported,
    MigrationFinished,
    MigrationOutcome,
    MigrationRequested,
    RequestAborted,
    RequestArrived,
    RequestFinished,
    Ticked,
)
from llumsched.core.load import InstanceLoad
from llumsched.core.scheduler import GlobalScheduler
from llumsched.core.types import PriorityClass
from llumsched.decision_log import DecisionLog
from llumsched.plugins import build_bundle
from llumsched.runtime.messages import (
    ClusterDescription,
    DescribeCluster,
    InstanceDescription,
    InstanceGone,
    Message,
    MigrateAnswer,
    MigrateRequest,
    OrderMigration,
    Placed,
    PlaceRequest,
    RegisterFrontend,
    RegisterInstance,
    ReportLoad,
    ReportMigration,
    ReportPrefixBlocks,
    RequestEnded,
    Unknown,
    Welcomed,
    decode_control,
    encode,
)

logger = logging.getLogger(__name__)

ACTOR_NAME = "llumsched-global-scheduler"
LOG_FLUSH_INTERVAL_S = 1.0


class Controller:
    """Args:
    config: the policy bundle and the scheduler's options.
    clock: seconds that only ever grow; handed to the core as ``now``.
    decision_log: a folder to keep ``(now, event, actions)`` in, for ``llumsched replay``.
    """

    def __init__(
        self,
        config: Config,
        clock: Callable[[], float] = time.monotonic,
        decision_log: Path | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        bundle = build_bundle(config)
        self._policy = bundle.name
        self._scheduler = GlobalScheduler(bundle, bundle.options, seed=config.seed)
        self._log = (
            DecisionLog(decision_log, config, self._scheduler.checkpoint) if decision_log else None
        )
        self._log_flushed_s = clock()
        self._instances: dict[str, RegisterInstance] = {}
        self._identities: dict[str, bytes] = {}
        self._loads: dict[str, InstanceLoad] = {}
        self._load_times_s: dict[str, float] = {}
        self._frontend_of: dict[str, bytes] = {}
        self._operator_calls: dict[str, tuple[bytes, int]] = {}
        self._outcomes: Counter[str] = Counter()
        self._causes: Counter[str] = Counter()
        self._policy_failures: Counter[str] = Counter()
        self._socket: zmq.asyncio.Socket | None = None
        self._outbox: list[tuple[bytes, Message]] = []

    def bind(self, context: zmq.asyncio.Context, host: str) -> str:
        """Open the control socket; its endpoint."""
        self._socket = context.socket(zmq.ROUTER)
        self._socket.bind(f"tcp://{host}:*")
        endpoint: str = self._socket.get_string(zmq.LAST_ENDPOINT)
        return endpoint

    async def serve(self) -> None:
        """Take in messages and pass time on, until cancelled."""
        assert self._socket is not None, "bind first"
        while True:
            wait_ms: int | None = None
            deadline_s = self._scheduler.next_deadline()
            if deadline_s is not None:
                wait_ms = max(0, math.ceil((deadline_s - self._clock()) * 1000))
            if await self._socket.poll(timeout=wait_ms):
                # Everything that has arrived, before the next look at the clock.
                while True:
                    try:
                        frames = await self._socket.recv_multipart(zmq.NOBLOCK)
                    except zmq.Again:
                        break
                    self._take_in(frames)
                    await self._flush()
            else:
                self._handle(Ticked())
                await self._flush()

    def instance_lost(self, instance_id: str, reason: str) -> None:
        """The process of an instance ended; told by whoever watches it."""
        self._instances.pop(instance_id, None)
        self._identities.pop(instance_id, None)
        self._loads.pop(instance_id, None)
        self._load_times_s.pop(instance_id, None)
        self._handle(InstanceLost(instance_id=instance_id, reason=reason))
        for identity in self._identities.values():
            self._outbox.append((identity, InstanceGone(instance_id=instance_id)))

    def close(self) -> None:
        """Write out the decision log."""
        if self._log is not None:
            self._log.close()
            self._log = None

    async def flush(self) -> None:
        """Send what ``instance_lost`` has to tell; ``serve`` does so by itself."""
        await self._flush()

    # ---- messages -------------------------------------------------------------------------

    def _take_in(self, frames: list[bytes]) -> None:
        try:
            identity, payload = frames
            message = decode_control(payload)
        except (ValueError, msgspec.DecodeError) as error:
            logger.warning("Dropped a malformed control message: %s", error)
            return
        match message:
            case RegisterInstance():
                self._register(identity, message)
            case ReportLoad():
                self._report_load(identity, message.load)
            case ReportPrefixBlocks():
                for event in message.events():
                    self._handle(event)
            case ReportMigration():
                self._report_migration(message)
            case RegisterFrontend():
                self._outbox.append((identity, Welcomed()))
            case PlaceRequest():
                self._frontend_of[message.request.request_id] = identity
                self._handle(RequestArrived(request=message.request))
            case RequestEnded():
                self._frontend_of.pop(message.request_id, None)
                self._handle(_end_of(message))
            case MigrateRequest():
                self._migrate(identity, message)
            case DescribeCluster():
                self._outbox.append((identity, self._describe(message.call_id)))
            case _:
                logger.warning("Dropped a message not meant for here: %s", type(message).__name__)

    def _register(self, identity: bytes, message: RegisterInstance) -> None:
        instance_id = message.spec.instance_id
        known = instance_id in self._instances
        self._instances[instance_id] = message
        self._identities[instance_id] = identity
        if not known:
            self._handle(InstanceJoined(spec=message.spec))
        self._outbox.append((identity, Welcomed()))

    def _report_load(self, identity: bytes, load: InstanceLoad) -> None:
        if load.instance_id not in self._instances:
            self._outbox.append((identity, Unknown()))
            return
        self._loads[load.instance_id] = load
        self._load_times_s[load.instance_id] = self._clock()
        self._handle(LoadReported(load=load))

    def _report_migration(self, report: ReportMigration) -> None:
        self._outcomes[report.outcome] += 1
        if report.cause:
            self._causes[report.cause] += 1
        logger.info(
            "Migration of %s from %s to %s: %s%s",
            report.request_id,
            report.source,
            report.destination,
            report.outcome,
            f" ({report.reason})" if report.reason else "",
        )
        self._handle(
            MigrationFinished(
                migration_id=report.migration_id,
                request_id=report.request_id,
                source=report.source,
                destination=report.destination,
                outcome=MigrationOutcome(report.outcome),
                reason=report.reason,
            )
        )
        call = self._operator_calls.pop(report.migration_id, None)
        if call is not None:
            identity, call_id = call
            self._outbox.append((identity, MigrateAnswer(call_id=call_id, report=report)))

    def _migrate(self, identity: bytes, message: MigrateRequest) -> None:
        actions = self._handle(
            MigrationRequested(request_id=message.request_id, destination=message.destination)
        )
        for action in actions:
            match action:
                case StartMigration(request_id=message.request_id):
                    self._operator_calls[action.migration_id] = (identity, message.call_id)
                    return
                case RefuseMigration(request_id=message.request_id):
                    answer = MigrateAnswer(call_id=message.call_id, refused=action.reason)
                    self._outbox.append((identity, answer))
                    return
        answer = MigrateAnswer(call_id=message.call_id, refused="the scheduler did not answer")
        self._outbox.append((identity, answer))

    def _describe(self, call_id: int) -> ClusterDescription:
        now_s = self._clock()
        snapshot = self._scheduler.snapshot(now_s)
        views = {view.instance_id: view for view in snapshot}
        described = []
        for instance_id in sorted(self._instances):
            view = views.get(instance_id)
            reported_s = self._load_times_s.get(instance_id)
            freeness = view.freeness if view is not None else None
            described.append(
                InstanceDescription(
                    instance_id=instance_id,
                    state=view.state.value if view is not None else "booting",
                    role=self._instances[instance_id].spec.role.value,
                    freeness=freeness if freeness is None or math.isfinite(freeness) else None,
                    report_age_s=now_s - reported_s if reported_s is not None else None,
                    load=self._loads.get(instance_id),
                )
            )
        return ClusterDescription(
            call_id=call_id,
            policy=self._policy,
            instances=described,
            migrations=dict(self._outcomes),
            migration_causes=dict(self._causes),
            queued={
                PriorityClass(priority).name.lower(): num_queued
                for priority, num_queued in self._scheduler.num_queued_by_class().items()
            },
            policy_failures=dict(self._policy_failures),
        )

    # ---- actions --------------------------------------------------------------------------

    def _handle(self, event: Event) -> tuple[Action, ...]:
        now_s = self._clock()
        actions = self._scheduler.handle(event, now_s)
        if self._log is not None:
            self._note(self._log, now_s, event, actions)
        for action in actions:
            self._carry_out(action)
        return actions

    def _note(
        self, log: DecisionLog, now_s: float, event: Event, actions: tuple[Action, ...]
    ) -> None:
        """Keep a decision; what is kept reaches the disk within a second of the next one."""
        try:
            log.write(now_s, event, actions)
            if now_s - self._log_flushed_s >= LOG_FLUSH_INTERVAL_S:
                self._log_flushed_s = now_s
                log.flush()
        except OSError as error:
            # A gap would make the rest useless, and no log is worth a request.
            logger.error("The decision log ends here: %s", error)
            self._log = None

    def _carry_out(self, action: Action) -> None:
        match action:
            case DispatchRequest():
                self._answer_placement(
                    Placed(
                        request_id=action.request_id,
                        instance_id=action.instance_id,
                        reason=action.reason,
                        predicted_output_tokens=action.predicted_output_tokens,
                    )
                )
            case RejectRequest():
                self._answer_placement(
                    Placed(
                        request_id=action.request_id,
                        instance_id=None,
                        reason=action.reason,
                        retry_after_s=action.retry_after_s,
                    )
                )
            case StartMigration():
                self._order_migration(action)
            case RefuseMigration():
                pass  # answered by _migrate
            case LaunchInstance():
                reason = "this deployment has a fixed number of instances"
                self._handle(LaunchFailed(launch_id=action.launch_id, reason=reason))
            case TerminateInstance():
                logger.info("Instance %s may leave: %s", action.instance_id, action.reason)
            case PolicyFailed():
                self._policy_failures[action.policy] += 1
                logger.error("Policy %s failed: %s", action.policy, action.error)

    def _answer_placement(self, answer: Placed) -> None:
        identity = self._frontend_of.get(answer.request_id)
        if identity is None:
            logger.warning("No frontend waits for the placement of %s", answer.request_id)
            return
        self._outbox.append((identity, answer))

    def _order_migration(self, action: StartMigration) -> None:
        source = self._identities.get(action.source)
        destination = self._instances.get(action.destination)
        if source is None or destination is None:
            missing = action.source if source is None else action.destination
            self._handle(
                MigrationFinished(
                    migration_id=action.migration_id,
                    request_id=action.request_id,
                    source=action.source,
                    destination=action.destination,
                    outcome=MigrationOutcome.REFUSED,
                    reason=f"instance {missing} is not connected",
                )
            )
            return
        order = OrderMigration(
            migration_id=action.migration_id,
            destination=action.destination,
            destination_endpoint=destination.peer_endpoint,
            request_id=action.request_id,
            reason=action.reason,
            settle_s=action.settle_s,
        )
        self._outbox.append((source, order))

    async def _flush(self) -> None:
        assert self._socket is not None
        outbox, self._outbox = self._outbox, []
        for identity, message in outbox:
            await self._socket.send_multipart([identity, encode(message)])


def _end_of(message: RequestEnded) -> Event:
    if message.aborted:
        return RequestAborted(request_id=message.request_id)
    return RequestFinished(
        request_id=message.request_id, num_output_tokens=message.num_output_tokens
    )


class ControllerActor:
    """The Ray actor around ``Controller``; its methods are coroutines of one event loop."""

    def __init__(self, config: Config, host: str, decision_log: Path | None) -> None:
        self._controller = Controller(config, decision_log=decision_log)
        self._context = zmq.asyncio.Context()
        self._endpoint = self._controller.bind(self._context, host)
        self._serving: asyncio.Task[None] | None = None

    async def endpoint(self) -> str:
        """Where frontends and instances connect; starts to serve."""
        if self._serving is None:
            self._serving = asyncio.create_task(self._controller.serve())
            self._serving.add_done_callback(_log_end)
        return self._endpoint

    async def close(self) -> None:
        """Write out the decision log; the actor may be killed afterwards."""
        self._controller.close()

    async def instance_lost(self, instance_id: str, reason: str) -> None:
        self._controller.instance_lost(instance_id, reason)
        await self._controller.flush()


def _log_end(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.critical("The global scheduler failed", exc_info=task.exception())
