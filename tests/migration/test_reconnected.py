"""The connection between two instances breaks at any state of either table, and is made again.

Nobody dies and nothing is dropped by hand: what was on its way is lost, the sockets connect again
by themselves, and the two get on as before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llumsched.core.migration.destination.events import ReservationState
from llumsched.core.migration.source.events import MigrationState
from llumsched.core.migration.source.record import MigrationOptions
from llumsched.core.transfer_options import TransferOptions
from llumsched.engine.transfer.torch_group import GroupChannel
from llumsched.migration.destination import IncomingMigration
from llumsched.migration.source import OutgoingMigration
from tests.campaigns import THOROUGH
from tests.migration.answers import seen_by_client
from tests.migration.cable import Cable
from tests.migration.cases import CASES
from tests.migration.pool import Pool

OPTIONS = MigrationOptions(
    reserve_timeout_s=0.8,
    stage_timeout_s=0.8,
    suspend_timeout_s=0.8,
    final_stage_timeout_s=0.8,
    commit_timeout_s=0.2,
    query_interval_s=0.1,
)
# Longer than every deadline.
CUT_S = 1.2
CASE = "long answer"
HERE, THERE = 0, 1

STATES: list[MigrationState | ReservationState] = [
    MigrationState.RESERVING,
    MigrationState.COPYING,
    MigrationState.SUSPENDING,
    MigrationState.COMMITTING,
    ReservationState.ALLOCATING,
    ReservationState.RESERVED,
    ReservationState.RECEIVING,
    ReservationState.COMMIT_PENDING,
    ReservationState.ADMITTING,
    ReservationState.COMMITTED,
]
CHOSEN_STATES = STATES if THOROUGH else [MigrationState.COPYING, ReservationState.ADMITTING]


@pytest.fixture(params=["auto", "tcp"] if THOROUGH else ["auto"])
def cable(pool: Pool, request: pytest.FixtureRequest) -> Iterator[Cable]:
    """The link to the instance there."""
    pool.configure(options=OPTIONS, transfer=TransferOptions(transport=request.param))
    migrator = pool.instances[THERE].migrator
    endpoint, cable = migrator.endpoint, Cable(migrator.endpoint)
    migrator.endpoint = pool.on_loop(cable.lay())
    yield cable
    migrator.endpoint = endpoint
    pool.on_loop(cable.remove())
    pool.settle()
    pool.configure()


def start(pool: Pool) -> str:
    case = CASES[CASE]
    answer = pool.submit(CASE, case.prompt(pool.tokenizer), case.params, at=HERE)
    pool.until(lambda: pool.num_tokens(CASE) >= 3)
    return answer.sequence_ids[0]


@pytest.mark.parametrize("state", CHOSEN_STATES, ids=str)
def test_a_link_breaks_and_is_made_again(
    pool: Pool,
    unmoved: dict[str, Any],
    cable: Cable,
    monkeypatch: pytest.MonkeyPatch,
    state: MigrationState | ReservationState,
) -> None:
    cut_at_s: list[float] = []

    def cutting_once(execute: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def cut_and_execute(self: Any, command: Any) -> None:
            if self.record.state is state and not cut_at_s:
                cut_at_s.append(time.monotonic())
                cable.cut()
            execute(self, command)

        return cut_and_execute

    for host in (OutgoingMigration, IncomingMigration):
        monkeypatch.setattr(host, "execute", cutting_once(host.execute))

    sequence_id = start(pool)
    moving = pool.start_move(sequence_id, THERE)
    pool.until(lambda: bool(cut_at_s), f"{state} is reached")
    pool.until(lambda: time.monotonic() > cut_at_s[0] + CUT_S)
    pool.on_loop(cable.mend())
    pool.until(moving.done)
    # Before the commit the source gives up by itself; after it, it asks until it is answered.
    assert moving.result().outcome in ("committed", "aborted", "refused")
    assert seen_by_client(pool.finish(CASE)[0]) == unmoved[CASE]

    sequence_id = start(pool)
    again = pool.move(sequence_id, THERE)
    assert again.outcome == "committed", again
    assert seen_by_client(pool.finish(CASE)[0]) == unmoved[CASE]


@pytest.mark.parametrize("end", ["send", "receive"])
def test_a_channel_that_broke_is_opened_again(
    pool: Pool, unmoved: dict[str, Any], monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """One migration ends with it, and the next one shakes hands anew."""
    pool.configure(transfer=TransferOptions(transport="gloo"))
    broken: list[Any] = []
    real = getattr(GroupChannel, end)

    def breaks(channel: GroupChannel, argument: Any) -> Any:
        if not broken:
            broken.append(channel)
        if channel is broken[0]:
            raise RuntimeError("Connection closed by peer")
        return real(channel, argument)

    monkeypatch.setattr(GroupChannel, end, breaks)
    sequence_id = start(pool)
    first = pool.move(sequence_id, THERE)
    assert first.outcome in ("aborted", "refused"), first
    second = pool.move(sequence_id, THERE)
    assert second.outcome == "committed", second
    assert seen_by_client(pool.finish(CASE)[0]) == unmoved[CASE]
    pool.settle()
    pool.configure()
