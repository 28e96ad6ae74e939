"""Races with a name, one step at a time: what was lost, doubled or late, and what came of it."""

from __future__ import annotations

import pytest

from llumsched.core.migration.destination.machine import (
    AcknowledgeCommit,
    ConfirmReservation,
    RefuseCommit,
    RejectReservation,
    Reservation,
    ReservationState,
)
from llumsched.core.migration.source import machine as source
from llumsched.core.migration.source.machine import MigrationOptions, MigrationState
from tests.fake_engine.engine import FakeEngine
from tests.fake_engine.request import (
    FakeOutput,
    expected_output,
)
from tests.migration_table.host import Instance
from tests.migration_table.wire import Command, Message

PROMPT = (5, 2, 8, 1, 6)
MAX_OUTPUT_TOKENS = 30


class Cluster:
    """Instances `a`, `b` and `c` and what they have sent each other; `a` decodes `r`."""

    def __init__(self, **num_blocks: int) -> None:
        self.link: list[Message] = []
        self.outputs: list[FakeOutput] = []
        self.repeats_of: list[str] = []
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

    def send(self, message: Message) -> None:
        self.link.append(message)

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
        return self.instances[here].start_migration(migration_id, "r", there)

    def take(self, kind: type[Command]) -> Message:
        """Take the next message of this kind off the link: to lose it, or to hold it back."""
        self.work()
        message = next(message for message in self.link if isinstance(message.command, kind))
        self.link.remove(message)
        return message

    def deliver(self, message: Message) -> None:
        receiver = self.instances[message.receiver]
        if receiver.alive:
            receiver.receive(message)
        self.work()

    def deliver_until(self, kind: type[Command] | None = None) -> None:
        """Deliver in order until a message of this kind comes next, or all have."""
        self.work()
        while self.link and not (kind and isinstance(self.link[0].command, kind)):
            self.deliver(self.link.pop(0))

    def work(self) -> None:
        for _ in range(3):
            for instance in self.instances.values():
                for queue in (instance.engine_work, instance.host_work, instance.losses):
                    while queue and instance.alive:
                        queue.popleft()()
                self.outputs += instance.engine.finish_step()

    def expire(self, instance_id: str) -> None:
        """The first wait of the instance comes to its deadline."""
        instance = self.instances[instance_id]
        instance.expire(instance.waits()[0])
        self.work()

    def kill(self, instance_id: str) -> None:
        self.instances[instance_id].alive = False
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

    def migration(self, instance_id: str, migration_id: str) -> source.Migration:
        return self.instances[instance_id].outgoing[migration_id].migration

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
    cluster.deliver_until(AcknowledgeCommit)
    cluster.take(AcknowledgeCommit)
    cluster.expire("a")
    assert cluster.migration("a", "m0").state is MigrationState.RESOLVING
    assert cluster.decoding() == ["b"]
    cluster.assert_ends_well("b")


def test_a_lost_close_is_asked_for() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(source.CloseMigration)
    cluster.take(source.CloseMigration)
    cluster.decode("b")
    assert not cluster.migrate("m1", "b", "c")
    cluster.expire("b")
    cluster.deliver_until()
    assert cluster.migrate("m1", "b", "c")
    cluster.assert_ends_well("c")


def test_a_query_that_overtakes_the_commit_decides_against_it() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(source.CommitRequest)
    late = cluster.take(source.CommitRequest)
    cluster.expire("a")
    cluster.deliver_until()
    assert cluster.migration("a", "m0").state is MigrationState.ABORTED
    cluster.deliver(late)
    cluster.assert_ends_well("a")


def test_a_doubled_commit_that_comes_after_its_answer_changes_nothing() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(source.CommitRequest)
    doubled = cluster.take(source.CommitRequest)
    cluster.deliver(doubled)
    cluster.deliver(doubled)
    cluster.deliver_until()
    cluster.deliver(doubled)
    cluster.assert_ends_well("b")


def test_a_request_stays_until_its_last_source_knows_where_it_is() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(AcknowledgeCommit)
    cluster.take(AcknowledgeCommit)
    cluster.decode("b")
    assert not cluster.migrate("m1", "b", "c")
    cluster.expire("a")
    cluster.deliver_until()
    assert cluster.migrate("m1", "b", "c")
    cluster.assert_ends_well("c")


def test_why_a_request_stays_until_its_last_source_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reservation, "may_move_on", True)
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(AcknowledgeCommit)
    cluster.take(AcknowledgeCommit)
    cluster.decode("b")
    assert cluster.migrate("m1", "b", "c")
    cluster.deliver_until()
    cluster.kill("b")  # `a` takes that for the end of its request, which has moved on
    assert cluster.decoding() == ["a", "c"]


def test_a_destination_that_dies_after_decoding_gives_the_request_back() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(AcknowledgeCommit)
    cluster.take(AcknowledgeCommit)
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
    cluster.deliver_until(source.CommitRequest)
    commit = cluster.take(source.CommitRequest)
    if committed:
        cluster.deliver(commit)
    cluster.kill("a")
    cluster.deliver(commit)
    if committed:
        assert cluster.instances["b"].incoming["m0"].reservation.may_move_on
        cluster.assert_ends_well("b")
    else:
        assert cluster.decoding() == []
        pool = cluster.instances["b"].engine.pool
        assert pool.num_free_blocks == pool.num_blocks


def test_a_destination_that_cannot_grow_keeps_nothing() -> None:
    cluster = Cluster(b=6)
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(source.CopyBlocks)
    cluster.decode("a", 8)
    cluster.deliver_until(RejectReservation)
    assert cluster.instances["b"].engine.pool.num_free_blocks == 6
    cluster.assert_ends_well("a")
    assert cluster.migration("a", "m0").abort_detail.startswith("no_room")


def test_a_stale_reservation_is_not_freed_by_the_next_migration() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(ConfirmReservation)
    cluster.take(ConfirmReservation)
    cluster.expire("a")
    late_release = cluster.take(source.ReleaseBlocks)
    # `b` still holds blocks for m0 and refuses the same request a second time.
    cluster.migrate("m1", "a", "b")
    reserve = cluster.take(source.ReserveBlocks)
    cluster.instances["b"].receive(reserve)
    cluster.expire("a")
    cluster.deliver_until()
    states = [
        cluster.instances["b"].incoming[migration_id].reservation.state
        for migration_id in ("m0", "m1")
    ]
    assert states == [ReservationState.RESERVED, ReservationState.RELEASED]
    cluster.instances["b"].engine.check()
    cluster.deliver(late_release)
    cluster.assert_ends_well("a")


# Aborts.


def test_an_abort_in_the_middle_of_the_commit_reaches_the_destination() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(AcknowledgeCommit)
    cluster.instances["a"].abort("r")
    cluster.deliver_until()
    assert cluster.decoding() == []


def test_an_abort_in_the_middle_of_a_refused_commit_ends_at_the_source() -> None:
    cluster = Cluster()
    cluster.migrate("m0", "a", "b")
    cluster.deliver_until(source.CommitRequest)
    cluster.take(source.CommitRequest)
    cluster.instances["a"].abort("r")
    cluster.expire("a")
    cluster.deliver_until(RefuseCommit)
    cluster.deliver_until()
    assert cluster.decoding() == []
    for instance in cluster.instances.values():
        assert instance.engine.pool.num_free_blocks == instance.engine.pool.num_blocks


def test_an_abort_follows_a_request_along_its_moves() -> None:
    cluster = Cluster()
    for migration_id, here, there in (("m0", "a", "b"), ("m1", "b", "c")):
        cluster.migrate(migration_id, here, there)
        cluster.deliver_until()
        cluster.decode(there)
    cluster.instances["a"].abort("r")
    cluster.deliver_until()
    assert cluster.decoding() == []


def test_an_abort_of_a_finished_request_does_not_go_round_in_circles() -> None:
    cluster = Cluster()
    for migration_id, here, there in (("m0", "a", "b"), ("m1", "b", "a")):
        cluster.migrate(migration_id, here, there)
        cluster.deliver_until()
        cluster.decode(there)
    cluster.decode("a", MAX_OUTPUT_TOKENS)
    for instance_id in ("a", "b"):
        cluster.instances[instance_id].abort("r")
        cluster.deliver_until()  # comes to an end
    assert cluster.link == []
