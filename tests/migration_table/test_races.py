"""Races with a name, one step at a time: what was lost, doubled or late, and what came of it."""

from __future__ import annotations

import pytest

from llumsched.core.migration.destination.events import ReservationState
from llumsched.core.migration.destination.record import Reservation
from llumsched.core.migration.messages import (
    BlocksCopied,
    BlocksReserved,
    CloseMigration,
    CommitAcknowledged,
    CommitRefused,
    CommitRequest,
    MigrationMessage,
    ReleaseReservation,
    ReservationRejected,
    ReserveBlocks,
)
from llumsched.core.migration.source.events import MigrationState
from llumsched.core.migration.source.record import MigrationOptions
from llumsched.engine.base import StepAhead
from llumsched.migration.messages import StoreBlocks
from tests.fake_engine.engine import FakeEngine
from tests.fake_engine.request import FakeOutput, expected_output
from tests.migration_table.clients import errors_are_violations
from tests.migration_table.host import Instance, Sent

PROMPT = (5, 2, 8, 1, 6)
MAX_OUTPUT_TOKENS = 30


Kind = type[MigrationMessage] | type[StoreBlocks]


class Cluster:
    """Instances `a`, `b` and `c` and what they have sent each other; `a` decodes `r`."""

    def __init__(self, **num_blocks: int) -> None:
        self.link: list[Sent] = []
        self.outputs: list[FakeOutput] = []
        self.repeats_of: list[str] = []
        self.lets_sleep = False
        self.instances = {
            instance_id: Instance(
                instance_id,
                FakeEngine(num_blocks=num_blocks.get(instance_id, 40), block_size=2),
                self,
                MigrationOptions(),
            )
            for instance_id in ("a", "b", "c")
        }
        self.instances["a"].engine.add_request("r", PROMPT, MAX_OUTPUT_TOKENS)
        self.decode("a", 4)

    # The network.

    def send(self, sent: Sent) -> None:
        self.link.append(sent)

    def notice(self, request_id: str, instance_id: str, order: tuple[int, int]) -> None:
        pass

    def allow_repeats(self, request_id: str) -> None:
        self.repeats_of.append(request_id)

    def admission_fails(self) -> bool:
        return False

    # What a test does.

    def decode(self, instance_id: str, num_steps: int = 1) -> None:
        engine = self.instances[instance_id].engine
        for _ in range(num_steps):
            engine.schedule_step()
            self.outputs += engine.finish_step()

    def migrate(self, migration_id: str, here: str, there: str) -> bool:
        started = self.instances[here].start_migration(migration_id, "r", there)
        self.work()
        return started

    def take(self, kind: Kind) -> Sent:
        """Take the next message of this kind off the link: to lose it, or to hold it back."""
        self.work()
        sent = next(sent for sent in self.link if isinstance(sent.message, kind))
        self.link.remove(sent)
        return sent

    def deliver(self, sent: Sent) -> None:
        receiver = self.instances[sent.receiver]
        if receiver.alive:
            receiver.receive(sent)
        self.work()

    def deliver_until(self, kind: Kind | None = None) -> None:
        """Deliver in order until a message of this kind comes next, or all have."""
        self.work()
        while self.link and not (kind and isinstance(self.link[0].message, kind)):
            self.deliver(self.link.pop(0))

    def work(self) -> None:
        """Let everything happen that happens by itself, but for the delivery of messages."""
        with errors_are_violations():
            while sum(self._work_at(each) for each in self.instances.values() if each.alive):
                pass

    def _work_at(self, instance: Instance) -> bool:
        worked = instance.loop.run_ready()
        for queue in (instance.engine_work, instance.copies):
            while queue:
                queue.popleft()()
                worked = True
        for timer in [] if self.lets_sleep else instance.sleeps():
            instance.loop.fire(timer)
            worked = True
        outputs = instance.engine.finish_step()
        self.outputs += outputs
        return worked or bool(outputs)

    def expire(self, instance_id: str) -> None:
        """The first wait of the instance comes to its deadline."""
        loop = self.instances[instance_id].loop
        loop.fire(self.instances[instance_id].deadlines()[0])
        self.work()

    def kill(self, instance_id: str) -> None:
        self.instances[instance_id].die()
        for instance in self.instances.values():
            if instance.alive:
                instance.peer_lost(instance_id, is_dead=True)
        self.work()

    def decoding(self) -> list[str]:
        return [
            instance.instance_id
            for instance in self.instances.values()
            if instance.alive and instance.engine.scheduled_request_ids
        ]

    def state(self, instance_id: str) -> MigrationState:
        """Where the only migration that leaves an instance stands."""
        (migration,) = self.instances[instance_id].migrations()
        return migration.state

    def outcome(self, instance_id: str, migration_id: str) -> str:
        report = self.instances[instance_id].reports[migration_id]
        return "" if report is None else f"{report.outcome}: {report.reason}"

    def tokens(self) -> list[int]:
        return [output.token_id for output in self.outputs]

    def assert_ends_well(self, instance_id: str) -> None:
        """`r` is decoded here alone, to the expected end, and every block is free then."""
        self.deliver_until()
        assert self.decoding() == [instance_id]
        self.decode(instance_id, MAX_OUTPUT_TOKENS)
        assert self.tokens() == expected_output(PROMPT, MAX_OUTPUT_TOKENS)
        for instance in self.instances.values():
            if instance.alive:
                instance.engine.check()
                assert instance.engine.pool.num_free_blocks == instance.engine.pool.num_blocks


def test_a_move_and_back_again() -> None:
    cluster = Cluster()
    for migration_id, here, there in (("m0", "a", "b"), ("m1", "b", "c"), ("m2", "c", "a")):
        assert cluster.migrate(migration_id, here, there)
        cluster.deliver_until()
        cluster.decode(there, 3)
    cluster.assert_ends_well("a")


def test_a_lost_acknowledgement_is_asked_for() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(CommitAcknowledged)
    cluster.take(CommitAcknowledged)
    cluster.expire("a")
    assert cluster.state("a") is MigrationState.RESOLVING
    assert cluster.decoding() == ["b"]
    cluster.assert_ends_well("b")


def test_a_query_that_overtakes_the_commit_decides_against_it() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(CommitRequest)
    late = cluster.take(CommitRequest)
    cluster.expire("a")
    cluster.deliver_until()
    assert cluster.outcome("a", "m0").startswith("aborted")
    cluster.deliver(late)
    cluster.assert_ends_well("a")


def test_a_doubled_commit_that_comes_after_its_answer_changes_nothing() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(CommitRequest)
    doubled = cluster.take(CommitRequest)
    cluster.deliver(doubled)
    cluster.deliver(doubled)
    cluster.deliver_until()
    cluster.deliver(doubled)
    cluster.assert_ends_well("b")


@pytest.mark.parametrize(("lost", "who_asks"), [(CommitAcknowledged, "a"), (CloseMigration, "b")])
def test_a_request_stays_until_its_last_source_knows_where_it_is(lost: Kind, who_asks: str) -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(lost)
    cluster.take(lost)
    cluster.decode("b")
    assert not cluster.migrate("m1", "b", "c")
    cluster.expire(who_asks)
    cluster.deliver_until()
    assert cluster.migrate("m1", "b", "c")
    cluster.assert_ends_well("c")


def test_why_a_request_stays_until_its_last_source_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reservation, "may_move_on", True)
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(CommitAcknowledged)
    cluster.take(CommitAcknowledged)
    cluster.decode("b")
    assert cluster.migrate("m1", "b", "c")
    cluster.deliver_until()
    cluster.kill("b")  # `a` takes that for the end of its request, which has moved on
    assert cluster.decoding() == ["a", "c"]


def test_a_destination_that_dies_after_decoding_gives_the_request_back() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(CommitAcknowledged)
    cluster.take(CommitAcknowledged)
    before = cluster.tokens()
    cluster.decode("b", 2)
    seen_from_b = cluster.tokens()[len(before) :]
    assert cluster.repeats_of == []
    cluster.kill("b")
    # The client drops, by position, what the source now repeats.
    assert cluster.repeats_of == ["r"]
    del cluster.outputs[len(before) :]
    cluster.decode("a", 2)
    assert cluster.tokens()[len(before) :] == seen_from_b
    cluster.assert_ends_well("a")


@pytest.mark.parametrize("committed", [True, False])
def test_a_source_that_dies_during_the_commit_leaves_nothing_behind(committed: bool) -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(CommitRequest)
    commit = cluster.take(CommitRequest)
    if committed:
        cluster.deliver(commit)
    cluster.kill("a")
    cluster.deliver(commit)
    if committed:
        assert cluster.instances["b"].reservations()["m0"].may_move_on
        cluster.assert_ends_well("b")
    else:
        assert cluster.decoding() == []
        pool = cluster.instances["b"].engine.pool
        assert pool.num_free_blocks == pool.num_blocks


def test_a_source_that_dies_while_its_request_is_admitted_is_not_waited_for() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(CommitRequest)
    destination = cluster.instances["b"]
    destination.receive(cluster.take(CommitRequest))
    destination.loop.run_ready()
    assert destination.reservations()["m0"].state is ReservationState.ADMITTING
    cluster.kill("a")
    assert destination.reservations()["m0"].state is ReservationState.RELEASED
    cluster.assert_ends_well("b")


def test_a_destination_that_cannot_grow_keeps_nothing() -> None:
    cluster = Cluster(b=6)
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(StoreBlocks)
    cluster.decode("a", 8)
    cluster.deliver_until(ReservationRejected)
    assert cluster.instances["b"].engine.pool.num_free_blocks == 6
    cluster.assert_ends_well("a")
    assert "no_room" in cluster.outcome("a", "m0")


def test_a_stale_reservation_is_not_freed_by_the_next_migration() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(BlocksReserved)
    cluster.take(BlocksReserved)
    cluster.expire("a")
    late_release = cluster.take(ReleaseReservation)
    # `b` still holds blocks for m0 and refuses the same request a second time.
    cluster.migrate("m1", "a", "b")
    reserve = cluster.take(ReserveBlocks)
    cluster.instances["b"].receive(reserve)
    cluster.expire("a")
    cluster.deliver_until()
    states = [
        cluster.instances["b"].reservations()[migration_id].state for migration_id in ("m0", "m1")
    ]
    assert states == [ReservationState.RESERVED, ReservationState.RELEASED]
    cluster.instances["b"].engine.check()
    cluster.deliver(late_release)
    cluster.assert_ends_well("a")


def test_what_ends_an_export_is_asked_last_however_fast_the_events_come() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(BlocksCopied)
    instance = cluster.instances["a"]
    instance.receive(cluster.take(BlocksCopied))
    instance.loop.run_ready()
    instance.engine_work.popleft()()  # it has few blocks left, and is to be suspended
    instance.loop.run_one()
    instance.engine.preempt("r")  # before the host has come to that
    cluster.deliver_until()
    assert cluster.outcome("a", "m0").startswith("aborted: request preempted")
    cluster.decode("a", 2)
    cluster.assert_ends_well("a")


# A long step of the destination.


def waiting_for_a_step() -> Cluster:
    """`r` is about to leave `a`, as soon as a step of `b` is about to end."""
    cluster = Cluster()
    cluster.instances["b"].step_ahead = StepAhead(ends_in_s=1.5, step_s=2.0)
    cluster.lets_sleep = True
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until()
    assert cluster.state("a") is MigrationState.SUSPENDING
    assert cluster.decoding() == ["a"]
    cluster.decode("a", 3)
    return cluster


def test_a_request_decodes_on_until_a_step_of_the_destination_is_about_to_end() -> None:
    cluster = waiting_for_a_step()
    cluster.lets_sleep = False
    cluster.assert_ends_well("b")


@pytest.mark.parametrize("what", ["finishes", "deadline", "destination dies", "preempted"])
def test_what_ends_a_migration_while_a_step_is_waited_for(what: str) -> None:
    cluster = waiting_for_a_step()
    match what:
        case "finishes":
            cluster.decode("a", MAX_OUTPUT_TOKENS)
        case "deadline":
            cluster.expire("a")
        case "destination dies":
            cluster.kill("b")
        case "preempted":
            cluster.instances["a"].engine.preempt("r")
    cluster.deliver_until()
    cluster.lets_sleep = False
    cluster.deliver_until()
    assert cluster.outcome("a", "m0").startswith("aborted")
    if what == "finishes":
        assert cluster.tokens() == expected_output(PROMPT, MAX_OUTPUT_TOKENS)
    else:
        cluster.decode("a", 2)
        cluster.assert_ends_well("a")


# Aborts.


def test_an_abort_in_the_middle_of_the_commit_reaches_the_destination() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(CommitAcknowledged)
    cluster.instances["a"].abort("r")
    cluster.deliver_until()
    assert cluster.decoding() == []


def test_an_abort_that_the_engine_hears_before_it_lets_go_reaches_the_destination() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(CommitAcknowledged)
    acknowledged = cluster.take(CommitAcknowledged)
    cluster.instances["a"].abort("r")
    cluster.instances["a"].receive(acknowledged)
    cluster.instances["a"].loop.run_ready()  # the table has the acknowledgement first
    cluster.deliver_until()
    assert cluster.decoding() == []


def test_an_abort_in_the_middle_of_a_refused_commit_ends_at_the_source() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(CommitRequest)
    cluster.take(CommitRequest)
    cluster.instances["a"].abort("r")
    cluster.expire("a")
    cluster.deliver_until(CommitRefused)
    cluster.deliver_until()
    assert cluster.decoding() == []
    for instance in cluster.instances.values():
        assert instance.engine.pool.num_free_blocks == instance.engine.pool.num_blocks
