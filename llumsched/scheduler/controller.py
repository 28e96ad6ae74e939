"""The global scheduler's host: messages in, events to the core, actions out as messages.

All decisions are the core's (``GlobalScheduler``); this turns what arrives on one socket into
events, gives the core the time, and sends what the core answers. Nothing in its loop waits for
anything but the next message or the core's next deadline. It runs as a named Ray actor, with
no state that could not be learned again from the instances.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from llumsched.config import Config, build_bundle
from llumsched.core.actions import (
    Action,
    LaunchInstance,
    RefuseMigration,
    StartMigration,
)
from llumsched.core.events import (
    DrainRequested,
    Event,
    InstanceJoined,
    InstanceLost,
    LaunchFailed,
    LoadReported,
    MigrationFinished,
    MigrationOutcome,
    MigrationRequested,
    ReplacementsCounted,
    RequestAborted,
    RequestArrived,
    RequestFinished,
    RequestSentElsewhere,
    ScaleRequested,
    Ticked,
)
from llumsched.core.scheduling.scheduler import GlobalScheduler
from llumsched.core.types import InstanceState, PriorityClass
from llumsched.decision_log import DecisionLog
from llumsched.logs import FailureLog
from llumsched.scheduler.action_executor import ActionExecutor
from llumsched.scheduler.decision_recorder import FLUSH_INTERVAL_S, DecisionRecorder
from llumsched.scheduler.event_log import SchedulerLog
from llumsched.scheduler.frontend_registry import FrontendRegistry
from llumsched.scheduler.instance_registry import InstanceRegistry
from llumsched.scheduler.metrics import SchedulerMetrics
from llumsched.scheduler.migration_worth import MigrationWorth, MigrationWorths
from llumsched.scheduler.pending_migrations import PendingMigrations
from llumsched.scheduler.request_history import RequestHistory
from llumsched.wire.control import (
    Accepted,
    ClusterDescription,
    DescribeCluster,
    DrainInstance,
    InstanceGone,
    InstanceLeaves,
    LaunchRefused,
    MigrateAnswer,
    MigrateRequest,
    OrderReplacement,
    Placed,
    PlaceRequest,
    RegisterFrontend,
    RegisterInstance,
    ReportLoad,
    ReportMigration,
    ReportPrefixBlocks,
    RequestEnded,
    RequestTraced,
    ScalePool,
    SentElsewhere,
    TraceRequest,
    Unknown,
    Welcomed,
    decode_control,
    encode,
)
from llumsched.wire.keys import HANDSHAKE_TIMEOUT_S, MAX_CONTROL_NUM_BYTES, Gate, PoolKeys

logger = logging.getLogger(__name__)

# By then the instances that there are have registered, also with one that was started again.
LEARNING_S = 2.0


class Controller:
    """Args:
    config: the policy bundle and the scheduler's options.
    clock: seconds that only ever grow; handed to the core as ``now``.
    decision_log: a folder to keep ``(now, event, actions)`` in, for ``llumsched replay``.
    learning_s: for so long from now on nothing is launched, since it may be there already.
    """

    def __init__(
        self,
        config: Config,
        clock: Callable[[], float] = time.monotonic,
        decision_log: Path | None = None,
        learning_s: float = LEARNING_S,
        flush_interval_s: float = FLUSH_INTERVAL_S,
    ) -> None:
        self._id = uuid.uuid4().hex
        self._config = config
        self._clock = clock
        self._started_s = clock()
        self._learning_s = learning_s
        bundle = build_bundle(config)
        self._policy = bundle.name
        self._scheduler = GlobalScheduler(bundle, bundle.options, seed=config.seed)
        self._notes = (
            DecisionRecorder(
                DecisionLog(
                    decision_log,
                    config,
                    self._scheduler.checkpoint,
                    epoch_s=lambda: time.time() - clock(),
                ),
                flush_interval_s,
            )
            if decision_log
            else None
        )
        parts = {type(policy).__qualname__ for policy in bundle.policies().values()}
        self._metrics = SchedulerMetrics(bundle.name, sorted(parts))
        self._instances = InstanceRegistry()
        self._reasons_told: set[str] = set()
        self._frontends = FrontendRegistry()
        self._orders = ActionExecutor(self._instances, self._frontends, self._handle)
        self._history = RequestHistory(lambda: self._instances.loads)
        self._worths = MigrationWorths()
        self._operator_calls = PendingMigrations()
        self._num_replacing = 0
        self._failures = FailureLog(logger)
        self._log = SchedulerLog(lambda: self._scheduler.draining, self._metrics.drained)
        self._socket: zmq.asyncio.Socket | None = None
        self._gate: Gate | None = None

    def bind(
        self,
        context: zmq.asyncio.Context,
        host: str,
        keys: PoolKeys,
        port: int = 0,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
    ) -> str:
        """Open the control socket, at any port if it is 0; its endpoint."""
        self._socket = context.socket(zmq.ROUTER)
        self._gate = Gate(
            context,
            keys,
            [(self._socket, MAX_CONTROL_NUM_BYTES)],
            "the scheduler",
            handshake_timeout_s=handshake_timeout_s,
        )
        self._socket.bind(f"tcp://{host}:{port or '*'}")
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
        self._instances.forget(instance_id)
        self._orders.instance_lost(instance_id)
        self._handle(InstanceLost(instance_id=instance_id, reason=reason))
        for identity in self._instances.identities.values():
            self._orders.send(identity, InstanceGone(instance_id=instance_id))
        self._orders.outbox.extend(self._operator_calls.source_lost(instance_id))

    def frontend_lost(self, frontend_id: str, request_ids: Sequence[str]) -> None:
        """The process of a frontend ended, and with it its clients' connections.

        Args:
            request_ids: what instances had of it; it may have more that waits here, and a scheduler
                that was started again may not know whose those are.
        """
        for request_id in dict.fromkeys((*self._frontends.lose(frontend_id), *request_ids)):
            self._handle(RequestAborted(request_id=request_id))

    def close(self) -> None:
        """Write out the decision log, and let nobody in any more."""
        if self._gate is not None:
            self._gate.close()
        if self._notes is not None:
            self._notes.close()
            self._notes = None

    async def flush(self) -> None:
        """Send what came of the last loss; ``serve`` does so by itself."""
        await self._flush()

    # ---- messages -------------------------------------------------------------------------

    def _take_in(self, frames: list[bytes]) -> None:
        try:
            identity, payload = frames
            message = decode_control(payload)
        except (ValueError, msgspec.DecodeError) as error:
            self._failures.warned("malformed", "Dropped a malformed control message: %s", error)
            return
        if self._frontends.is_dead(identity):
            return
        match message:
            case RegisterInstance():
                self._register(identity, message)
            case ReportLoad():
                self._report_load(identity, message)
            case ReportPrefixBlocks():
                for event in message.events():
                    self._handle(event)
            case ReportMigration():
                self._report_migration(message)
            case RegisterFrontend():
                self._register_frontend(identity, message)
            case PlaceRequest():
                self._place(identity, message)
            case SentElsewhere():
                self._frontends.asked(message.request.request_id, identity)
                event = RequestSentElsewhere(
                    request=message.request, instance_id=message.instance_id
                )
                self._handle(event)
            case RequestEnded():
                self._frontends.ended(message.request_id)
                self._handle(_end_of(message))
            case MigrateRequest():
                self._migrate(identity, message)
            case InstanceLeaves():
                self._orders.tell_supervisor(OrderReplacement(instance_id=message.instance_id))
                self._handle(DrainRequested(instance_id=message.instance_id))
            case DrainInstance() | ScalePool() if self._is_learning():
                pass  # The operator's frontend asks again.
            case DrainInstance():
                self._drain(identity, message)
            case ScalePool():
                self._handle(ScaleRequested(num_instances=message.num_instances))
                self._orders.send(identity, Accepted(call_id=message.call_id))
            case LaunchRefused():
                self._handle(LaunchFailed(launch_id=message.launch_id, reason=message.reason))
            case TraceRequest():
                traced = self._history.steps(message.request_id)
                answer = RequestTraced(call_id=message.call_id, requests=traced)
                self._orders.send(identity, answer)
            case DescribeCluster():
                self._orders.send(identity, self._describe(message.call_id))
            case _:
                kind = type(message).__name__
                self._failures.warned(kind, "Dropped a message not meant for here: %s", kind)

    def _register(self, identity: bytes, message: RegisterInstance) -> None:
        instance_id = message.spec.instance_id
        known = instance_id in self._instances
        self._instances.register(identity, message)
        if message.cannot_migrate and message.cannot_migrate not in self._reasons_told:
            self._reasons_told.add(message.cannot_migrate)
            logger.warning(
                "No request can leave or reach %s, nor instances like it: %s",
                instance_id,
                message.cannot_migrate,
            )
        if not known:
            self._handle(
                InstanceJoined(
                    spec=message.spec,
                    launch_id=message.launch_id,
                    request_ids=message.request_ids,
                )
            )
        self._orders.send(identity, Welcomed(scheduler_id=self._id))

    def _register_frontend(self, identity: bytes, message: RegisterFrontend) -> None:
        self._frontends.register(identity, message.frontend_id)
        if message.supervises:
            self._orders.supervised_by(identity)
            if message.num_replacing != self._num_replacing:
                self._num_replacing = message.num_replacing
                self._handle(ReplacementsCounted(num_instances=message.num_replacing))
        for instance_id in message.draining:
            # Known already, unless this scheduler has taken the place of another.
            if self._state(instance_id) is InstanceState.SERVING:
                self._handle(DrainRequested(instance_id=instance_id))
        self._orders.send(identity, Welcomed(scheduler_id=self._id))

    def _place(self, identity: bytes, message: PlaceRequest) -> None:
        request = message.request
        self._frontends.asked(request.request_id, identity)
        placed_at = self._scheduler.request_instance(request.request_id)
        if placed_at is None or placed_at not in self._instances:
            self._handle(RequestArrived(request=request, has_begun=message.has_begun))
        elif placed_at != message.lost:
            # The answer was lost, or the request is where its frontend did not see it come.
            self._orders.answer_placement(
                Placed(
                    request_id=request.request_id,
                    instance_id=placed_at,
                    engine_index=self._instances[placed_at].engine_index,
                    reason="placed already",
                )
            )
        # Else the loss of that instance is about to be told here as well, and places it again.

    def _drain(self, identity: bytes, message: DrainInstance) -> None:
        refused = None
        if self._state(message.instance_id) in (None, InstanceState.GONE):
            refused = f"there is no instance {message.instance_id}"
        else:
            self._handle(
                DrainRequested(instance_id=message.instance_id, deadline_s=message.deadline_s)
            )
        self._orders.send(identity, Accepted(call_id=message.call_id, refused=refused))

    def _state(self, instance_id: str) -> InstanceState | None:
        views = self._scheduler.snapshot(self._clock())
        return views[instance_id].state if instance_id in views.rows else None

    def _report_load(self, identity: bytes, message: ReportLoad) -> None:
        load = message.load
        if load.instance_id not in self._instances:
            self._orders.send(identity, Unknown())
            return
        self._instances.report(message, self._clock())
        self._handle(LoadReported(load=load))

    def _report_migration(self, report: ReportMigration) -> None:
        self._metrics.migration_ended(report)
        self._history.migration_ended(report)
        self._migrations_won(self._worths.migration_ended(report, self._clock()))
        self._log.migration_ended(report)
        statistics = report.statistics
        self._handle(
            MigrationFinished(
                migration_id=report.migration_id,
                request_id=report.request_id,
                source=report.source,
                destination=report.destination,
                outcome=MigrationOutcome(report.outcome),
                reason=report.reason,
                pause_s=(
                    None if statistics is None or report.has_ended else statistics.suspended_s
                ),
                num_bytes=0 if statistics is None else statistics.num_bytes,
                total_s=0.0 if statistics is None else statistics.total_s,
            )
        )
        self._orders.outbox.extend(self._operator_calls.ended(report))

    def _migrate(self, identity: bytes, message: MigrateRequest) -> None:
        actions = self._handle(
            MigrationRequested(
                request_id=message.request_id,
                destination=message.destination,
                session_id=message.session_id,
            )
        )
        for action in actions:
            match action:
                case StartMigration():
                    self._operator_calls.begun(action, identity, message.call_id)
                    return
                case RefuseMigration():
                    answer = MigrateAnswer(call_id=message.call_id, refused=action.reason)
                    self._orders.send(identity, answer)
                    return
        answer = MigrateAnswer(call_id=message.call_id, refused="the scheduler did not answer")
        self._orders.send(identity, answer)

    def _describe(self, call_id: int) -> ClusterDescription:
        return ClusterDescription(
            call_id=call_id,
            policy=self._policy,
            scheduler_age_s=self._age_s(),
            instances=self._instances.describe(self._scheduler.snapshot(self._clock())),
            migrations=self._metrics.outcomes,
            migration_causes=self._metrics.causes,
            queued={
                PriorityClass(priority).name.lower(): num_queued
                for priority, num_queued in self._scheduler.num_queued_by_class().items()
            },
            policy_failures=self._metrics.policy_failures,
            num_finished_requests=self._metrics.num_finished_requests,
            num_output_tokens=self._metrics.num_output_tokens,
            unproven={
                "scheduler": self._gate.num_unauthenticated if self._gate is not None else 0,
                **self._instances.unproven,
            },
        )

    # ---- actions --------------------------------------------------------------------------

    def _handle(self, event: Event) -> tuple[Action, ...]:
        now_s = self._clock()
        begun_s = time.perf_counter()
        actions = self._scheduler.handle(event, now_s)
        self._metrics.handled(event, actions, time.perf_counter() - begun_s)
        if self._notes is not None:
            self._notes.note(now_s, event, actions)
        self._log.handled(event, actions)
        self._migrations_won(self._worths.handled(event, actions, now_s))
        self._history.handled(event, actions, self._scheduler.scores)
        for action in actions:
            if isinstance(action, LaunchInstance) and self._is_learning():
                reason = "the scheduler has just started, and learns what there is"
                self._handle(LaunchFailed(launch_id=action.launch_id, reason=reason))
            else:
                self._orders.carry_out(action)
        return actions

    def _migrations_won(self, worths: Iterable[MigrationWorth]) -> None:
        for worth in worths:
            self._metrics.migration_won(worth)
            self._history.migration_won(worth)

    def _age_s(self) -> float:
        return self._clock() - self._started_s

    def _is_learning(self) -> bool:
        """True while it has just started, perhaps in the place of another: what there is is being
        told, and would be launched once more beside it."""
        return self._orders.supervisor is None or self._age_s() < self._learning_s

    async def _flush(self) -> None:
        assert self._socket is not None
        for identity, message in self._orders.take_outbox():
            await self._socket.send_multipart([identity, encode(message)])


def _end_of(message: RequestEnded) -> Event:
    if message.aborted:
        return RequestAborted(request_id=message.request_id)
    return RequestFinished(
        request_id=message.request_id, num_output_tokens=message.num_output_tokens
    )
