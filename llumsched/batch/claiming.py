"""How workers take lines and give them back: claims under a lease, and outcomes.

The invariants are those of `store`. A claim counts while its worker renews its lease. A worker that
lost its lease may still be answered; the answer finds no claim of its own and is dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import sqlalchemy as sa

from llumsched.batch.database import Database, batches, claims, lines, outcomes, workers
from llumsched.batch.states import Event, Status, after
from llumsched.batch.store import Again, Claimed, Ended, change, end_if_over, locked


def renew(
    database: Database,
    worker_id: str,
    now: float,
    lease_s: float,
    *,
    lines_per_s: float = 0.0,
    num_in_flight: int = 0,
) -> None:
    """Keep the claims of a worker for so long, and tell how it fares."""
    values = {
        "lease_until": now + lease_s,
        "lines_per_s": lines_per_s,
        "num_in_flight": num_in_flight,
    }
    with database.writing() as connection:
        found = connection.execute(
            sa.update(workers).where(workers.c.worker_id == worker_id).values(values)
        )
        if not found.rowcount:
            connection.execute(sa.insert(workers), {"worker_id": worker_id, **values})


def leave(database: Database, worker_id: str, now: float) -> None:
    """End a worker: what it still holds is free at once."""
    with database.writing() as connection:
        connection.execute(sa.delete(workers).where(workers.c.worker_id == worker_id))
    maintain(database, now)


def claim(database: Database, worker_id: str, most: int, now: float) -> list[Claimed]:
    """Up to `most` lines for this worker: the batch with the earliest deadline first, in it those
    that are tried again before those that are new."""
    is_due = sa.exists().where(
        claims.c.batch_id == batches.c.batch_id,
        claims.c.worker_id.is_(None),
        claims.c.not_before <= now,
    )
    query = (
        sa.select(batches.c.batch_id)
        .where(
            batches.c.status == Status.IN_PROGRESS,
            batches.c.expires_at > now,
            sa.or_(batches.c.claimed_up_to < batches.c.total, is_due),
        )
        .order_by(batches.c.expires_at, batches.c.created_at, batches.c.batch_id)
    )
    with database.reading() as connection:
        batch_ids = connection.scalars(query.limit(most)).all()
    found: list[Claimed] = []
    for batch_id in batch_ids:
        if len(found) < most:
            with database.writing() as connection:
                found += _claim_of(connection, batch_id, worker_id, most - len(found), now)
    return found


def _claim_of(
    connection: sa.Connection, batch_id: str, worker_id: str, most: int, now: float
) -> list[Claimed]:
    batch = locked(connection, batch_id)
    if batch is None or batch.status != Status.IN_PROGRESS:
        return []
    of_batch = claims.c.batch_id == batch_id
    again = connection.scalars(
        sa.select(claims.c.position)
        .where(of_batch, claims.c.worker_id.is_(None), claims.c.not_before <= now)
        .order_by(claims.c.not_before, claims.c.position)
        .limit(most)
    ).all()
    if again:
        connection.execute(
            sa.update(claims)
            .where(of_batch, claims.c.position.in_(again))
            .values(worker_id=worker_id, claim_number=claims.c.claim_number + 1)
        )
    first = batch.claimed_up_to + 1
    new = range(first, min(batch.total, batch.claimed_up_to + most - len(again)) + 1)
    if new:
        rows = [
            {"batch_id": batch_id, "position": p, "worker_id": worker_id, "claim_number": 1}
            for p in new
        ]
        connection.execute(sa.insert(claims), rows)
        connection.execute(
            sa.update(batches).where(batches.c.batch_id == batch_id).values(claimed_up_to=new[-1])
        )
    query = (
        sa.select(claims, lines.c.custom_id, lines.c.text)
        .join(
            lines,
            sa.and_(lines.c.file_id == batch.input_file_id, lines.c.position == claims.c.position),
        )
        .where(of_batch, claims.c.position.in_([*again, *new]))
    )
    return [
        Claimed(
            batch_id=batch_id,
            position=row.position,
            claim_number=row.claim_number,
            num_failures=row.num_failures,
            custom_id=row.custom_id,
            owner=batch.owner,
            expires_at=batch.expires_at,
            text=row.text,
        )
        for row in connection.execute(query)
    ]


def settle(
    database: Database,
    worker_id: str,
    batch_id: str,
    results: Sequence[Ended | Again],
    now: float,
) -> tuple[int, int]:
    """Write what became of claimed lines of one batch, in one transaction.

    A result whose claim is this worker's no more is dropped.

    Returns:
        how many outcomes were written: of success, and of failure.
    """
    num_completed = num_failed = 0
    with database.writing() as connection:
        batch = locked(connection, batch_id)
        if batch is None:
            return 0, 0
        for result in results:
            own = sa.and_(
                claims.c.batch_id == batch_id,
                claims.c.position == result.position,
                claims.c.worker_id == worker_id,
                claims.c.claim_number == result.claim_number,
            )
            if isinstance(result, Ended):
                if connection.execute(sa.delete(claims).where(own)).rowcount:
                    row = {
                        "batch_id": batch_id,
                        "position": result.position,
                        "is_success": result.is_success,
                        "text": result.text,
                    }
                    connection.execute(sa.insert(outcomes), row)
                    num_completed += result.is_success
                    num_failed += not result.is_success
            else:
                connection.execute(
                    sa.update(claims)
                    .where(own)
                    .values(
                        worker_id=None,
                        not_before=result.not_before,
                        num_failures=claims.c.num_failures + int(result.is_failure),
                    )
                )
        if num_completed or num_failed:
            connection.execute(
                sa.update(batches)
                .where(batches.c.batch_id == batch_id)
                .values(
                    completed=batches.c.completed + num_completed,
                    failed=batches.c.failed + num_failed,
                )
            )
        end_if_over(connection, batch_id, now)
    return num_completed, num_failed


def maintain(database: Database, now: float) -> int:
    """Free the lines of workers that are gone, and end batches whose time is over.

    Returns:
        how many lines were freed.
    """
    num_freed = 0
    is_live = sa.exists().where(
        workers.c.worker_id == claims.c.worker_id, workers.c.lease_until > now
    )
    is_lost = sa.and_(claims.c.worker_id.is_not(None), sa.not_(is_live))
    with database.reading() as connection:
        with_lost = set(connection.scalars(sa.select(claims.c.batch_id).where(is_lost).distinct()))
        overdue = set(
            connection.scalars(
                sa.select(batches.c.batch_id).where(
                    batches.c.status == Status.IN_PROGRESS, batches.c.expires_at <= now
                )
            )
        )
        cancelling = set(
            connection.scalars(
                sa.select(batches.c.batch_id).where(batches.c.status == Status.CANCELLING)
            )
        )
        is_any_gone = connection.scalar(
            sa.select(sa.func.count()).select_from(workers).where(workers.c.lease_until <= now)
        )
    for batch_id in sorted(with_lost | overdue | cancelling):
        with database.writing() as connection:
            batch = locked(connection, batch_id)
            if batch is None:
                continue
            of_batch = claims.c.batch_id == batch_id
            num_freed += connection.execute(
                sa.update(claims).where(of_batch, is_lost).values(worker_id=None, not_before=now)
            ).rowcount
            status = Status(batch.status)
            if batch.expires_at <= now:
                status = after(status, Event.DEADLINE)
            if status != batch.status:
                connection.execute(sa.delete(claims).where(of_batch))
                change(connection, batch_id, status, ended_at=now)
            else:
                end_if_over(connection, batch_id, now)
    if is_any_gone:
        with database.writing() as connection:
            connection.execute(sa.delete(workers).where(workers.c.lease_until <= now))
    return num_freed


def ended_of(database: Database, batch_ids: Collection[str]) -> set[str]:
    """Batches, of those named, of which nothing more is to be sent."""
    query = sa.select(batches.c.batch_id).where(
        batches.c.batch_id.in_(batch_ids), batches.c.status == Status.IN_PROGRESS
    )
    with database.reading() as connection:
        return set(batch_ids) - set(connection.scalars(query))
