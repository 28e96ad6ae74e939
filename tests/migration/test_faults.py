"""A process that dies, hangs or cannot be reached, at whatever state of a migration: a request
that lives says what it would have said, and nothing is left of the migration."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from llumsched.core.migration.messages import CloseMigration, ToDestination
from llumsched.core.migration.source.events import MigrationState
from llumsched.core.migration.source.record import MigrationOptions
from llumsched.core.transfer_options import TransferOptions
from llumsched.migration import link as peer_link
from llumsched.migration import migrator
from llumsched.migration.link import PeerConnection
from llumsched.migration.messages import (
    Hello,
    PeerMessage,
    StoreBlocks,
    Welcome,
    decode_peer,
)
from llumsched.migration.migrator import Migrator
from llumsched.migration.source import OutgoingMigration
from tests.campaigns import THOROUGH
from tests.migration.answers import seen_by_client
from tests.migration.cases import CASES
from tests.migration.pool import Pool

SOURCE, DESTINATION = 0, 1
HURRIED = MigrationOptions(
    reserve_timeout_s=0.4,
    stage_timeout_s=0.4,
    suspend_timeout_s=0.4,
    final_stage_timeout_s=0.4,
    commit_timeout_s=0.2,
    query_interval_s=0.1,
)
# Longer than every deadline.
FAULT_S = 1.0
STATES = [
    MigrationState.RESERVING,
    MigrationState.COPYING,
    MigrationState.SUSPENDING,
    MigrationState.COMMITTING,
]
# Each takes seconds of waiting for deadlines; the last two are where either side may have it.
CHOSEN_STATES = STATES if THOROUGH else STATES[-2:]
CASE = "long answer"


@pytest.fixture(autouse=True)
def hurried(pool: Pool) -> Iterator[None]:
    pool.configure(options=HURRIED)
    yield
    for instance in pool.instances:
        if instance.hangs:
            pool.restart(instance.index)
    pool.settle()
    pool.configure()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[MigrationState, Callable[[], None]], None]:
    """Let something happen when the source has come to a state, before it acts upon it."""

    def at(state: MigrationState, fault: Callable[[], None]) -> None:
        has_happened: list[bool] = []
        real = OutgoingMigration.execute

        def execute(self: OutgoingMigration, command: Any) -> None:
            if self.record.state is state and not has_happened:
                has_happened.append(True)
                fault()
            real(self, command)

        monkeypatch.setattr(OutgoingMigration, "execute", execute)

    return at


def start(pool: Pool) -> str:
    case = CASES[CASE]
    answer = pool.submit(CASE, case.prompt(pool.tokenizer), case.params)
    pool.until(lambda: pool.num_tokens(CASE) >= 3)
    return answer.sequence_ids[0]


@pytest.mark.parametrize("who", [SOURCE, DESTINATION], ids=["source", "destination"])
@pytest.mark.parametrize("state", CHOSEN_STATES)
def test_an_engine_hangs(
    pool: Pool,
    unmoved: dict[str, Any],
    at: Callable[[MigrationState, Callable[[], None]], None],
    who: int,
    state: MigrationState,
) -> None:
    """Longer than every deadline; then it goes on as if nothing had been."""
    sequence_id = start(pool)
    at(state, lambda: setattr(pool.instances[who], "hangs", True))
    moving = pool.start_move(sequence_id, DESTINATION)
    pool.until(lambda: pool.instances[who].hangs or moving.done())
    until_s = time.monotonic() + FAULT_S
    pool.until(lambda: time.monotonic() > until_s)
    pool.instances[who].hangs = False
    pool.until(moving.done)
    assert moving.result().outcome in ("committed", "aborted", "refused")
    assert seen_by_client(pool.finish(CASE)[0]) == unmoved[CASE]


@pytest.mark.parametrize("state", CHOSEN_STATES)
def test_the_link_is_cut_for_a_while(
    pool: Pool,
    unmoved: dict[str, Any],
    at: Callable[[MigrationState, Callable[[], None]], None],
    monkeypatch: pytest.MonkeyPatch,
    state: MigrationState,
) -> None:
    cut_until_s = [0.0]

    def lose(decode: Callable[[Any], PeerMessage]) -> Callable[[Any], PeerMessage]:
        def decode_or_lose(frame: Any) -> PeerMessage:
            if time.monotonic() < cut_until_s[0]:
                raise msgspec.DecodeError("lost on the way")
            return decode(frame)

        return decode_or_lose

    monkeypatch.setattr(peer_link, "decode_peer", lose(decode_peer))
    monkeypatch.setattr(migrator, "decode_peer", lose(decode_peer))
    sequence_id = start(pool)
    at(state, lambda: cut_until_s.__setitem__(0, time.monotonic() + FAULT_S))
    moving = pool.start_move(sequence_id, DESTINATION)
    pool.until(moving.done)
    assert moving.result().outcome in ("committed", "aborted", "refused")
    assert seen_by_client(pool.finish(CASE)[0]) == unmoved[CASE]
    # The destination's own deadlines free what the source could not tell it to.
    release(pool)


@pytest.mark.parametrize("who", [SOURCE, DESTINATION], ids=["source", "destination"])
@pytest.mark.parametrize("state", CHOSEN_STATES)
def test_an_instance_dies(
    pool: Pool,
    unmoved: dict[str, Any],
    at: Callable[[MigrationState, Callable[[], None]], None],
    who: int,
    state: MigrationState,
) -> None:
    """With the destination dead the request goes on at the source; with the source dead it may
    have arrived, or is lost with it. The survivor holds nothing for it."""
    sequence_id = start(pool)
    at(state, lambda: setattr(pool.instances[who], "hangs", True))
    moving = pool.start_move(sequence_id, DESTINATION)
    pool.until(lambda: pool.instances[who].hangs or moving.done())
    pool.kill(who)
    if who == DESTINATION:
        pool.until(moving.done)
        # It is not dead to the frontend unless it had announced itself.
        if pool.routes.get(sequence_id) is not None:
            assert moving.result().outcome in ("aborted", "refused")
            assert seen_by_client(pool.finish(CASE)[0]) == unmoved[CASE]
    survivor = pool.instances[1 - who]
    pool.until(lambda: not survivor.port._imports and not survivor.port._exports)
    # Whatever the dead one had under way is gone with it.
    moving.cancel()
    pool.answers.pop(CASE, None)


@pytest.mark.parametrize("seed", range(2))
def test_messages_lost_doubled_late_and_reordered(
    pool: Pool, unmoved: dict[str, Any], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    handle = Migrator._handle

    async def handle_badly(self: Migrator, identity: bytes, message: Any, payload: Any) -> None:
        if isinstance(message, Hello):
            return await handle(self, identity, message, payload)
        fate = chance.random()
        if fate < 0.04:
            return None
        if fate < 0.30:
            await asyncio.sleep(chance.random() * 0.1)
        if fate > 0.85:
            await handle(self, identity, message, payload)
            await asyncio.sleep(chance.random() * 0.1)
        return await handle(self, identity, message, payload)

    monkeypatch.setattr(Migrator, "_handle", handle_badly)

    def decode_badly(frame: Any) -> PeerMessage:
        message: PeerMessage = decode_peer(frame)
        if chance.random() < 0.04 and not isinstance(message, Welcome):
            raise msgspec.DecodeError("lost on the way")
        return message

    monkeypatch.setattr(peer_link, "decode_peer", decode_badly)
    wanted = ("long prompt, seed", "penalties, seed", "long prompt", "grammar", "long answer")
    names = [name for name in wanted if name in unmoved][:4]
    indices = range(len(pool.instances))
    sequences = []
    for index, name in enumerate(names):
        case = CASES[name]
        answer = pool.submit(
            name, case.prompt(pool.tokenizer), case.params, at=index % len(indices)
        )
        sequences += answer.sequence_ids
    outcomes = []
    while not all(pool.answers[name].done for name in names):
        for sequence_id in sequences:
            route = pool.routes.get(sequence_id)
            if route is not None and route.num_tokens > 1 and chance.random() < 0.4:
                here = pool.where(sequence_id)
                other = chance.choice([i for i in indices if i != here])
                outcomes.append(pool.start_move(sequence_id, other))
        pool.step()
        pool.step()
    pool.until(lambda: all(move.done() for move in outcomes))
    found = [move.result().outcome for move in outcomes]
    assert "committed" in found
    for name, output in zip(names, pool.finish(*names), strict=True):
        assert seen_by_client(output) == unmoved[name], (name, found)
    monkeypatch.undo()
    release(pool)


def test_a_client_leaves_at_every_state(
    pool: Pool,
    unmoved: dict[str, Any],
    at: Callable[[MigrationState, Callable[[], None]], None],
) -> None:
    for state in STATES:
        sequence_id = start(pool)
        reached: list[bool] = []
        at(state, lambda r=reached: r.append(True))  # type: ignore[misc]
        moving = pool.start_move(sequence_id, DESTINATION)
        pool.until(lambda r=reached, m=moving: bool(r) or m.done())  # type: ignore[misc]
        pool.abort(CASE)
        pool.until(moving.done)
        pool.settle()


def test_a_part_that_comes_twice_does_not_stand_for_one_that_never_came(
    pool: Pool, unmoved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first stage the second part is lost and the first is doubled."""
    pool.configure(options=HURRIED, transfer=TransferOptions(staging_slot_mb=0.1))
    handle = Migrator._handle

    async def double_the_first(self: Migrator, identity: bytes, message: Any, payload: Any) -> None:
        if isinstance(message, StoreBlocks) and message.stage == 1:
            if message.first_block == message.stage_first_block + 1:
                return
            if message.first_block == message.stage_first_block:
                await handle(self, identity, message, payload)
        await handle(self, identity, message, payload)

    monkeypatch.setattr(Migrator, "_handle", double_the_first)
    sequence_id = start(pool)
    report = pool.move(sequence_id, DESTINATION)
    assert (report.outcome, report.cause) == ("aborted", "deadline_expired")
    assert seen_by_client(pool.finish(CASE)[0]) == unmoved[CASE]


def test_a_destination_that_hangs_holds_up_its_own_migrations_only(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The destination reads no part that was sent to it, and all slots are on their way to it."""
    # In less time than this another move may not end on a busy machine.
    unhurried = replace(
        HURRIED,
        reserve_timeout_s=2.0,
        stage_timeout_s=2.0,
        suspend_timeout_s=2.0,
        final_stage_timeout_s=2.0,
    )
    pool.configure(
        options=unhurried, transfer=TransferOptions(staging_slots=1, staging_slot_mb=0.1)
    )
    sequence_id = start(pool)
    hung, store = pool.instances[1].migrator, Migrator._store

    async def store_or_hang(self: Migrator, *arguments: Any) -> float:
        if self is hung:
            await asyncio.sleep(3600)
        return await store(self, *arguments)

    monkeypatch.setattr(Migrator, "_store", store_or_hang)
    first = pool.move(sequence_id, 1)
    assert (first.outcome, first.cause) == ("aborted", "deadline_expired")
    second = pool.move(sequence_id, 2)
    assert second.outcome == "committed", second
    pool.finish(CASE)


def release(pool: Pool) -> None:
    """Reservations whose source could not release them expire; do not wait for a minute."""

    async def expire() -> None:
        for instance in pool.instances:
            for arriving in instance.migrator._incoming:
                when = arriving._timer
                if arriving._is_allocated and when is not None:
                    callback, arguments = when._callback, when._args  # type: ignore[attr-defined]
                    when.cancel()
                    callback(*arguments)

    pool.until(lambda: all(i.migrator.num_outgoing == 0 for i in pool.instances))
    pool.on_loop(expire())


def test_closing_is_asked_for_again(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source's word that it knows of the commit is lost: the destination repeats its answer,
    and the request may then move on."""
    lost: list[ToDestination] = []
    send = PeerConnection.send

    async def lose_once(self: PeerConnection, message: ToDestination) -> None:
        if isinstance(message, CloseMigration) and not lost:
            lost.append(message)
            return
        await send(self, message)

    monkeypatch.setattr(PeerConnection, "send", lose_once)
    sequence_id = start(pool)
    assert pool.move(sequence_id, 1).outcome == "committed"
    assert lost
    assert pool.move(sequence_id, 2).outcome == "committed"
    pool.finish(CASE)


def test_who_ends_has_nobody_to_answer(pool: Pool) -> None:
    """Work in hand when the sockets are closed ends quietly."""
    ended = pool.instances[DESTINATION].migrator
    pool.configure()
    hello = Hello(
        instance_id="instance-0",
        fingerprint=ended._fingerprint,
        transport="auto",
        offers={"tcp": b""},
    )
    pool.on_loop(ended._handle(b"instance-0", hello, None))
