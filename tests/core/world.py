"""A small world around the scheduler: instances that hold requests, report late, and die.

It carries out the scheduler's actions and knows the truth, so it can say whether a decision was
right when it was made. Reports travel in order of sending, but may arrive late; so may the ends of
migrations. Nothing here looks inside the scheduler.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

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
from llumsched.core.codec import decode, encode
from llumsched.core.events import (
    DrainRequested,
    Event,
    InstanceJoined,
    InstanceLost,
    KvBlocksStored,
    LaunchFailed,
    LoadReported,
    MigrationFinished,
    MigrationOutcome,
    RequestAborted,
    RequestArrived,
    RequestFinished,
    RequestSentElsewhere,
    Ticked,
)
from llumsched.core.load import InstanceLoad
from llumsched.core.policy import PolicyBundle
from llumsched.core.scheduling.scheduler import GlobalScheduler
from llumsched.core.types import InstanceState
from tests.core.builders import BLOCK_SIZE, TOTAL_BLOCKS, make_request, make_spec
from tests.core.invariants import check_invariants, check_reconciled


@dataclass
class Instance:
    """One engine, as it really is."""

    requests: dict[str, int] = field(default_factory=dict)
    """Request id -> blocks; the first ones that fit are running, the others wait."""
    received: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    sequence: int = 0
    is_draining: bool = False
    is_terminated: bool = False

    def split(self) -> tuple[list[int], list[int]]:
        running: list[int] = []
        waiting: list[int] = []
        for num_blocks in self.requests.values():
            fits = not waiting and sum(running) + num_blocks <= TOTAL_BLOCKS
            (running if fits else waiting).append(num_blocks)
        return running, waiting


class World:
    """Drives one scheduler, remembers every event, and checks each action."""

    def __init__(self, make_bundle: Callable[[], PolicyBundle], seed: int = 0) -> None:
        self.make_bundle = make_bundle
        self.seed = seed
        self.scheduler = GlobalScheduler(make_bundle(), seed=seed)
        self.now = 0.0
        self.history: list[tuple[float, Event, tuple[Action, ...]]] = []
        self.instances: dict[str, Instance] = {}
        self.live: dict[str, int] = {}
        """Requests that arrived and have not ended -> their blocks."""
        self.homeless: set[str] = set()
        """Live requests that were never dispatched, or whose instance died."""
        self.migrations: dict[str, StartMigration] = {}
        self.late_reports: list[LoadReported] = []
        self.late_ends: list[MigrationFinished] = []
        self.failures: list[PolicyFailed] = []
        self.launches: list[str] = []
        self.num_instances = 0

    # Events.

    def handle(self, event: Event) -> tuple[Action, ...]:
        actions = self.scheduler.handle(event, self.now)
        self.history.append((self.now, event, actions))
        for action in actions:
            self.carry_out(action)
        for view in self.scheduler.snapshot(self.now):
            # Scaling drains without an action: nothing has to be done until the instance is empty.
            is_serving = view.state is InstanceState.SERVING
            self.instances[view.instance_id].is_draining |= not is_serving
        check_invariants(self.scheduler)
        self.check_places()
        return actions

    def join(self, launch_id: str | None = None) -> None:
        instance_id = f"i{self.num_instances:02}"
        self.num_instances += 1
        self.instances[instance_id] = Instance()
        self.handle(InstanceJoined(spec=make_spec(instance_id), launch_id=launch_id))

    def boot(self, *, fails: bool) -> None:
        """The oldest launch leads to an instance, or does not."""
        launch_id = self.launches.pop(0)
        if fails:
            self.handle(LaunchFailed(launch_id=launch_id, reason="no machine"))
        else:
            self.join(launch_id)

    def restart(self) -> None:
        """Go on with another scheduler, made from a checkpoint of this one."""
        state = json.loads(json.dumps(self.scheduler.checkpoint(), allow_nan=False))
        self.scheduler = GlobalScheduler(self.make_bundle(), seed=self.seed + 1)
        self.scheduler.restore(state)
        check_invariants(self.scheduler)

    def lose(self, instance_id: str) -> None:
        # A commit that happened is told before its instance is declared dead: else it runs twice.
        self.deliver_ends()
        # The frontends have seen the last token of what ended there, and tell it.
        lost = [r.load for r in self.late_reports if r.load.instance_id == instance_id]
        untold = [r for load in lost for r in load.finished_request_ids]
        for request_id in untold + self.instances[instance_id].finished:
            self.handle(RequestFinished(request_id=request_id))
        del self.instances[instance_id]
        self.late_reports = [r for r in self.late_reports if r.load.instance_id != instance_id]
        for migration_id, migration in list(self.migrations.items()):
            if instance_id in (migration.source, migration.destination):
                del self.migrations[migration_id]
        self.homeless = {r for r in self.live if self.place(r) is None}
        self.handle(InstanceLost(instance_id=instance_id))

    def arrive(self, request_id: str, num_blocks: int, priority: int = 0) -> None:
        self.live[request_id] = num_blocks
        self.homeless.add(request_id)
        request = make_request(
            request_id,
            num_blocks=num_blocks,
            scheduling_priority=priority,
            execution_priority=priority,
            client_id=f"c{num_blocks % 3}",
            session_id=f"s{num_blocks}" if num_blocks % 2 else None,
            prefix_hashes=tuple(range(num_blocks)),
        )
        self.handle(RequestArrived(request=request))

    def send_elsewhere(self, request_id: str, instance_id: str) -> None:
        """A frontend has sent it to an instance of its own choice, perhaps from a paused one."""
        before = self.place(request_id)
        if before is not None:
            del self.instances[before].requests[request_id]
            if request_id in self.instances[before].received:
                self.instances[before].received.remove(request_id)
        self.homeless.discard(request_id)
        instance = self.instances[instance_id]
        instance.requests[request_id] = self.live[request_id]
        instance.received.append(request_id)
        request = make_request(request_id, num_blocks=self.live[request_id])
        self.handle(RequestSentElsewhere(request=request, instance_id=instance_id))

    def finish(self, request_id: str, *, tell: bool) -> None:
        """A running request ends; the frontend tells, or only the next report does."""
        instance_id = self.place(request_id)
        assert instance_id is not None
        self.end(request_id)
        if tell:
            self.handle(RequestFinished(request_id=request_id, num_output_tokens=10))

    def abort(self, request_id: str) -> None:
        self.end(request_id)
        self.handle(RequestAborted(request_id=request_id))

    def end(self, request_id: str) -> None:
        instance_id = self.place(request_id)
        del self.live[request_id]
        self.homeless.discard(request_id)
        if instance_id is not None:
            del self.instances[instance_id].requests[request_id]
            self.instances[instance_id].finished.append(request_id)

    def report(self, instance_id: str, *, late: bool = False) -> None:
        instance = self.instances[instance_id]
        running, waiting = instance.split()
        moves = self.migrations.values()
        instance.sequence += 1
        event = LoadReported(
            load=InstanceLoad(
                instance_id=instance_id,
                sequence=instance.sequence,
                num_total_blocks=TOTAL_BLOCKS,
                num_free_blocks=TOTAL_BLOCKS - sum(running),
                num_running=len(running),
                num_waiting=len(waiting),
                head_of_line_blocks=waiting[0] if waiting else 0,
                num_waiting_blocks=sum(waiting),
                num_prefill_tokens_pending=sum(waiting) * BLOCK_SIZE,
                step_time_s=0.02,
                num_migrations_in=sum(m.destination == instance_id for m in moves),
                num_migrations_out=sum(m.source == instance_id for m in moves),
                received_request_ids=tuple(instance.received),
                finished_request_ids=tuple(instance.finished),
            )
        )
        instance.received, instance.finished = [], []
        self.late_reports.append(event)
        if not late:
            self.deliver_reports()

    def deliver_reports(self) -> None:
        while self.late_reports:
            self.handle(self.late_reports.pop(0))

    def cache(self, instance_id: str, num_blocks: int) -> None:
        """An instance tells that it has cached the start of every prompt."""
        hashes = tuple(range(num_blocks))
        self.handle(KvBlocksStored(instance_id=instance_id, block_hashes=hashes))

    def drain(self, instance_id: str, deadline_s: float | None) -> None:
        self.instances[instance_id].is_draining = True
        self.handle(DrainRequested(instance_id=instance_id, deadline_s=deadline_s))

    def end_migration(self, migration_id: str, *, commits: bool, late: bool) -> None:
        migration = self.migrations.pop(migration_id)
        source = self.instances[migration.source]
        destination = self.instances[migration.destination]
        running, _ = source.split()
        candidates = list(source.requests)[: len(running)]
        request_id = migration.request_id or (candidates[-1] if candidates else None)
        outcome = MigrationOutcome.ABORTED
        if migration.has_ended:
            assert request_id not in self.live
            assert migration.source in self.instances
            outcome = MigrationOutcome.COMMITTED if commits else MigrationOutcome.REFUSED
        elif request_id is None:
            outcome = MigrationOutcome.NOTHING_TO_MOVE
        elif commits and request_id in source.requests and not destination.is_terminated:
            outcome = MigrationOutcome.COMMITTED
            destination.requests[request_id] = source.requests.pop(request_id)
            destination.received.append(request_id)
            if request_id in source.received:
                source.received.remove(request_id)
        self.late_ends.append(
            MigrationFinished(
                migration_id=migration_id,
                request_id=request_id,
                source=migration.source,
                destination=migration.destination,
                outcome=outcome,
            )
        )
        if not late:
            self.deliver_ends()

    def deliver_ends(self) -> None:
        while self.late_ends:
            self.handle(self.late_ends.pop(0))

    def advance(self, by_s: float) -> None:
        self.now += by_s
        self.handle(Ticked())

    # Actions.

    def carry_out(self, action: Action) -> None:
        assert decode(encode(action)) == action
        match action:
            case DispatchRequest():
                assert action.request_id in self.homeless, "dispatched twice, or after its end"
                instance = self.instances[action.instance_id]
                assert not instance.is_draining
                assert self.is_serving(action.instance_id)
                self.homeless.remove(action.request_id)
                instance.requests[action.request_id] = self.live[action.request_id]
                instance.received.append(action.request_id)
            case RejectRequest():
                assert action.request_id in self.homeless, "rejected after it was dispatched"
                self.homeless.remove(action.request_id)
                del self.live[action.request_id]
            case StartMigration():
                assert action.source != action.destination
                assert not self.instances[action.source].is_terminated
                destination = self.instances[action.destination]
                assert not destination.is_draining
                assert self.is_serving(action.destination)
                self.migrations[action.migration_id] = action
            case TerminateInstance():
                assert not self.instances[action.instance_id].is_terminated
                self.instances[action.instance_id].is_draining = True
                self.instances[action.instance_id].is_terminated = True
            case PolicyFailed():
                self.failures.append(action)
            case LaunchInstance():
                self.launches.append(action.launch_id)
            case RefuseMigration():
                pass

    # Truth.

    def is_serving(self, instance_id: str) -> bool:
        return self.scheduler.snapshot(self.now)[instance_id].state is InstanceState.SERVING

    def place(self, request_id: str) -> str | None:
        places = [i for i, instance in self.instances.items() if request_id in instance.requests]
        assert len(places) <= 1, "a request runs twice"
        return places[0] if places else None

    def check_places(self) -> None:
        """No request is lost: it is held, or where the scheduler has it."""
        moved = {end.request_id for end in self.late_ends}
        for request_id in self.live:
            known = self.scheduler.request_instance(request_id)
            if request_id not in moved:
                assert known == self.place(request_id), request_id
        # What waits elsewhere and goes to a newcomer holds no KV, and needs no slot.
        slots = [m for m in self.migrations.values() if not m.reason.endswith("has just joined")]
        for instance_id in {m.source for m in slots}:
            assert sum(m.source == instance_id for m in slots) <= (
                self.scheduler.options.max_migrations_out
            )

    def finish_all(self) -> None:
        """Finish what runs, until nothing is left; what a policy still holds is rejected."""
        for _ in range(50):
            for request_id in [r for r in self.live if self.place(r) is not None]:
                self.finish(request_id, tell=True)
            for migration_id in list(self.migrations):
                self.end_migration(migration_id, commits=False, late=False)
            for instance_id in list(self.instances):
                self.report(instance_id)
            if not self.live and not self.migrations:
                return
            self.advance(self.scheduler.options.queue_timeout_s / 10)

    def settle(self) -> None:
        """Let everything come to its end, and look at what is left."""
        self.deliver_ends()
        for migration_id in list(self.migrations):
            self.end_migration(migration_id, commits=True, late=False)
        if not any(not i.is_draining for i in self.instances.values()):
            self.join()
        self.finish_all()
        # What drains leaves at its deadline.
        self.advance(self.scheduler.options.drain_timeout_s)
        self.finish_all()
        assert not self.live
        for instance in self.instances.values():
            assert instance.is_terminated or not instance.is_draining
        check_reconciled(self.scheduler)

    def check_determinism(self) -> None:
        """The same events lead another scheduler to the same actions."""
        other = GlobalScheduler(self.make_bundle(), seed=self.seed)
        for now, event, actions in self.history:
            assert decode(encode(event)) == event
            assert other.handle(event, now) == actions
            # When a host asks for the deadline must not matter.
            other.next_deadline()
