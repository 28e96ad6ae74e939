"""A process is killed, stopped or cut off at each state of either table, by the kernel itself.

Whatever happens and whenever: no token comes from two instances that live, every token is the one
that an undisturbed request has, a request that some living instance has ends, and what a migration
held is given back. ``test_faults`` plays the same in one process, where time stands still at will.

Played with ``LLUMSCHED_THOROUGH=1``.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from llumsched.core.migration.destination.events import ReservationState
from llumsched.core.migration.source.events import MigrationState
from llumsched.wire.control import OrderMigration
from llumsched.wire.keys import PoolKeys
from tests.campaigns import THOROUGH
from tests.migration.processes import (
    FAULT_S,
    HURRIED,
    Fault,
    RemoteInstance,
    Side,
    What,
    until,
)

NUM_TOKENS = 120
PROMPT = [504 + i * 7 % 4000 for i in range(400)]

STATES = [
    *(
        (Side.SOURCE, state.value)
        for state in MigrationState
        if state is not MigrationState.ABORTED
    ),
    *(
        (Side.DESTINATION, state.value)
        for state in ReservationState
        if state not in (ReservationState.ABSENT, ReservationState.RELEASED)
    ),
]
CASES = [(side, state, what) for (side, state), what in itertools.product(STATES, What)]


class Two:
    """Two instances; a dead one is replaced by another of a new name."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._numbers = itertools.count()
        self._keys = PoolKeys.generate()
        self._living: list[RemoteInstance] = []

    def both(self) -> list[RemoteInstance]:
        while len(self._living) < 2:
            name = f"process-{next(self._numbers)}"
            self._living.append(RemoteInstance(self._model, name, self._keys))
        until(lambda: all(i.endpoint for i in self._living), self._living, "both have booted")
        return list(self._living)

    def lose(self, dead: RemoteInstance) -> None:
        dead.end()
        self._living.remove(dead)

    def end(self) -> None:
        for instance in list(self._living):
            self.lose(instance)


@pytest.fixture(scope="module")
def two(model: str) -> Iterator[Two]:
    two = Two(model)
    try:
        yield two
    finally:
        two.end()


@pytest.fixture(scope="module")
def expected(two: Two) -> list[int]:
    """The tokens of a request that nothing happens to."""
    first, _ = two.both()
    first.submit("undisturbed", PROMPT, NUM_TOKENS)
    stay = first.stays["undisturbed"]
    until(lambda: stay.is_finished, [first])
    return stay.token_ids


@pytest.mark.skipif(not THOROUGH, reason="boots engines in processes, to end them")
@pytest.mark.parametrize(("side", "state", "what"), CASES)
def test_a_fault(two: Two, expected: list[int], side: Side, state: str, what: What) -> None:
    source, destination = instances = two.both()
    victim = source if what in (What.KILL_SOURCE, What.STOP_SOURCE) else destination
    for instance in instances:
        instance.heard.clear()
        instance.reports.clear()
        instance.stays.clear()
    at = source if side is Side.SOURCE else destination
    at.ask("await_fault", Fault(side=side, state=state, what=what, pid=victim.pid))
    until(lambda: "armed" in at.heard, instances)
    request_id = f"{side} {state} {what}"
    source.submit(request_id, PROMPT, NUM_TOKENS)
    until(lambda: len(source.stays[request_id].token_ids) >= 3, instances)
    order = OrderMigration(
        migration_id=f"m {request_id}",
        destination=destination.name,
        destination_endpoint=destination.endpoint,
        request_id=request_id,
        reason="a test",
    )
    options = HURRIED
    if state == MigrationState.RESOLVING:
        # The last stage is there by then, and the answer to the commit is held back for longer.
        options = replace(HURRIED, final_stage_timeout_s=0.02, commit_timeout_s=0.001)
    source.ask("migrate", order, options)
    until(lambda: "happens" in at.heard, instances, "the state is reached")

    survivors = instances
    if what in (What.KILL_SOURCE, What.KILL_DESTINATION):
        until(lambda: "death" in victim.heard, instances, "it is dead")
        two.lose(victim)
        survivors = [i for i in instances if i is not victim]
        survivors[0].ask("peer_gone", victim.name)
    elif what in (What.STOP_SOURCE, What.STOP_DESTINATION):
        time.sleep(FAULT_S)
        os.kill(victim.pid, signal.SIGCONT)

    if source in survivors:
        until(lambda: bool(source.reports), survivors, "the migration ends")
    # All is given back, the request's own blocks too: whoever has it has ended it.
    until(lambda: all(is_at_rest(i) for i in survivors), survivors, "all is given back")
    stays = {i.name: i.stays[request_id] for i in instances if request_id in i.stays}
    for stay in stays.values():
        assert stay.token_ids == [expected[position] for position in stay.positions]
    living = [stays[i.name] for i in survivors if i.name in stays]
    positions = [position for stay in living for position in stay.positions]
    assert len(positions) == len(set(positions)), "two instances decoded it"
    match what:
        case What.KILL_SOURCE:  # lost with it, unless it had arrived
            is_lost = destination.name not in stays
        case What.KILL_DESTINATION:  # lost only if the source knew that it had arrived
            is_lost = source.reports[0].outcome == "committed"
        case _:
            is_lost = False
            assert sorted(positions) == list(range(NUM_TOKENS))
    assert sum(stay.is_finished for stay in living) == (0 if is_lost else 1)


def is_at_rest(instance: RemoteInstance) -> bool:
    """By its latest description; asks for a newer one."""
    found, instance.description = instance.description, {}
    if not found and "asked" not in instance.heard:
        instance.heard.add("asked")
        instance.ask("describe")
    elif found:
        instance.heard.discard("asked")
    return bool(found) and not any(found.values())
