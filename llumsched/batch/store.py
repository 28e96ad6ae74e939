"""Batches, claims of their lines, and outcomes, in the database.

Invariants, in every state that a transaction leaves behind:

- a line up to `claimed_up_to` has a claim or an outcome, never both; one beyond it has neither;
- `completed` and `failed` are the numbers of outcomes;
- an outcome is written in the transaction that ends its claim, and only by the worker that holds
  the claim, so a line has at most one;
- a batch that has ended has no claims.

A transaction locks one batch, before anything else, so that no two wait for one another. Every
function blocks: an event loop calls them in a thread.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from llumsched.batch.database import Database, batches, claims, files, workers
from llumsched.batch.files import ERRORS, OUTPUT, PURPOSE, Conflict, NotFound
from llumsched.batch.lines import ENDPOINTS
from llumsched.batch.states import OPEN, Event, Status, after

UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WINDOW = re.compile(r"(?P<number>[1-9]\d{0,5})(?P<unit>[smhd])")


class BadRequest(ValueError):
    """A batch cannot be made as it was asked for; the message names the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A line that this worker, and no other, is to send."""

    batch_id: str
    position: int
    claim_number: int
    num_failures: int
    custom_id: str
    owner: str
    expires_at: float
    text: bytes
    """The line as it was uploaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A claimed line has come to its end. `text` is the line of the output or error file."""

    position: int
    claim_number: int
    is_success: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """A claimed line is to be sent again, not before a time.

    `is_failure` is False where the line itself was not at fault: the worker ends, or the endpoint
    cannot be reached.
    """

    position: int
    claim_number: int
    not_before: float
    is_failure: bool


def window_s(text: str) -> float:
    """Seconds of a completion window such as `24h`.

    Raises:
        BadRequest: the text is none.
    """
    found = _WINDOW.fullmatch(text)
    if found is None:
        raise BadRequest("'completion_window' must be a time such as 24h, 90m, or 7d.")
    return float(int(found["number"]) * UNIT_S[found["unit"]])


def create(
    database: Database,
    owner: str,
    *,
    input_file_id: str,
    endpoint: str,
    completion_window: str = "24h",
    metadata: Mapping[str, str] | None = None,
    now: float,
    batch_id: str | None = None,
) -> dict[str, Any]:
    """Make a batch of an uploaded file; one that has the id already is left as it is.

    Raises:
        BadRequest: something is wrong.
        NotFound: the client has no such file.
    """
    if endpoint not in ENDPOINTS:
        raise BadRequest(f"'endpoint' must be one of {', '.join(ENDPOINTS)}.")
    seconds = window_s(completion_window)
    batch_id = batch_id or f"batch_{uuid.uuid4().hex}"
    with database.writing() as connection:
        file = connection.execute(
            sa.select(files)
            .where(
                files.c.file_id == input_file_id,
                files.c.owner == owner,
                files.c.status == "processed",
                files.c.purpose == PURPOSE,
            )
            .with_for_update()
        ).one_or_none()
        if file is None:
            raise NotFound(f"No such input file: {input_file_id}.")
        errors = None if file.endpoint == endpoint else _mismatch(connection, file, endpoint)
        status = Status.IN_PROGRESS if errors is None else Status.FAILED
        row = {
            "batch_id": batch_id,
            "owner": owner,
            "status": status,
            "endpoint": endpoint,
            "completion_window": completion_window,
            "input_file_id": input_file_id,
            "output_file_id": f"file-{uuid.uuid4().hex}",
            "error_file_id": f"file-{uuid.uuid4().hex}",
            "metadata": None if metadata is None else dict(metadata),
            "errors": errors,
            "created_at": now,
            "expires_at": now + seconds,
            "in_progress_at": now if errors is None else None,
            "ended_at": None if errors is None else now,
            "total": file.num_lines,
        }
        made = connection.execute(database.insert_new(batches).values(row)).rowcount
        if made and errors is None:
            connection.execute(sa.insert(files), _own_files(row))
    return get(database, owner, batch_id, now)


def _own_files(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Files whose content is the batch's outcomes."""
    return [
        {
            "file_id": batch[f"{name}_file_id"],
            "owner": batch["owner"],
            "filename": f"{batch['batch_id']}_{name}.jsonl",
            "purpose": purpose,
            "status": "processed",
            "created_at": batch["created_at"],
            "batch_id": batch["batch_id"],
        }
        for name, purpose in (("output", OUTPUT), ("error", ERRORS))
    ]


def _mismatch(connection: sa.Connection, file: Any, endpoint: str) -> list[dict[str, Any]]:
    message = f"Every line's 'url' must be the batch's endpoint, {endpoint}."
    wrong = file.endpoint or "more than one endpoint"
    return [
        {
            "code": "mismatched_endpoint",
            "message": f"{message} The file has {wrong}.",
            "param": "url",
            "line": None,
        }
    ]


def get(database: Database, owner: str, batch_id: str, now: float) -> dict[str, Any]:
    """A batch as OpenAI's API has it, with what is predicted of it.

    Raises:
        NotFound: the client has no such batch.
    """
    query = sa.select(batches).where(batches.c.batch_id == batch_id, batches.c.owner == owner)
    with database.reading() as connection:
        row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFound(f"No such batch: {batch_id}.")
        return describe(connection, row, now)


def list_page(
    database: Database, owner: str, *, after_id: str | None, limit: int, now: float
) -> tuple[list[dict[str, Any]], bool]:
    """Batches of a client, the youngest first, and whether there are more.

    Raises:
        NotFound: there is no batch `after_id`.
    """
    query = sa.select(batches).where(batches.c.owner == owner)
    key = sa.tuple_(batches.c.created_at, batches.c.batch_id)
    with database.reading() as connection:
        if after_id is not None:
            last = connection.execute(query.where(batches.c.batch_id == after_id)).one_or_none()
            if last is None:
                raise NotFound(f"No such batch: {after_id}.")
            bound = sa.tuple_(sa.literal(last.created_at), sa.literal(last.batch_id))
            query = query.where(key < bound)
        query = query.order_by(batches.c.created_at.desc(), batches.c.batch_id.desc())
        rows = connection.execute(query.limit(limit + 1)).all()
        return [describe(connection, row, now) for row in rows[:limit]], len(rows) > limit


def describe(connection: sa.Connection, row: Any, now: float) -> dict[str, Any]:
    """A batch as OpenAI's API has it; `llumsched` beside it says what that API has no place for."""

    def at(time_s: float | None) -> int | None:
        return None if time_s is None else int(time_s)

    def ended(*statuses: Status) -> int | None:
        return at(row.ended_at) if row.status in statuses else None

    is_over = row.status not in (*OPEN, Status.FAILED)
    has_errors = row.failed or (row.status == Status.EXPIRED and row.completed < row.total)
    found: dict[str, Any] = {
        "id": row.batch_id,
        "object": "batch",
        "endpoint": row.endpoint,
        "errors": None if row.errors is None else {"object": "list", "data": row.errors},
        "input_file_id": row.input_file_id,
        "completion_window": row.completion_window,
        "status": row.status,
        "output_file_id": row.output_file_id if is_over and row.completed else None,
        "error_file_id": row.error_file_id if is_over and has_errors else None,
        "created_at": at(row.created_at),
        "in_progress_at": at(row.in_progress_at),
        "expires_at": at(row.expires_at),
        "finalizing_at": ended(Status.COMPLETED),
        "completed_at": ended(Status.COMPLETED),
        "failed_at": ended(Status.FAILED),
        "expired_at": ended(Status.EXPIRED),
        "cancelling_at": at(row.cancelling_at),
        "cancelled_at": ended(Status.CANCELLED),
        "request_counts": {
            "total": row.total,
            "completed": row.completed,
            "failed": row.failed,
        },
        "metadata": row.metadata,
    }
    if row.status in OPEN:
        in_flight, waiting = (
            connection.scalar(
                sa.select(sa.func.count()).where(claims.c.batch_id == row.batch_id, condition)
            )
            for condition in (claims.c.worker_id.is_not(None), claims.c.worker_id.is_(None))
        )
        predicted_s = predicted_end(connection, row, now)
        found["llumsched"] = {
            "num_in_flight": in_flight,
            "num_to_be_tried_again": waiting,
            "predicted_finish_at": at(predicted_s),
            "is_in_time": None if predicted_s is None else predicted_s <= row.expires_at,
            "partial_output_file_id": row.output_file_id,
            "partial_error_file_id": row.error_file_id,
        }
    return found


def predicted_end(connection: sa.Connection, row: Any, now: float) -> float | None:
    """When a batch ends if lines go on ending as they do; None if nobody can say.

    Those with earlier deadlines go first.
    """
    rate = _lines_per_s(connection, now)
    if not rate:
        return None
    left = connection.scalar(
        sa.select(sa.func.sum(batches.c.total - batches.c.completed - batches.c.failed)).where(
            batches.c.status == Status.IN_PROGRESS, batches.c.expires_at <= row.expires_at
        )
    )
    return now + float(left or 0) / rate


def _lines_per_s(connection: sa.Connection, now: float) -> float:
    """Lines that all workers together end in a second."""
    query = sa.select(sa.func.sum(workers.c.lines_per_s)).where(workers.c.lease_until > now)
    return float(connection.scalar(query) or 0.0)


def is_any_late(database: Database, now: float) -> bool:
    """True if a batch will miss its deadline at the present rate."""
    left = batches.c.total - batches.c.completed - batches.c.failed
    query = (
        sa.select(left, batches.c.expires_at)
        .where(batches.c.status == Status.IN_PROGRESS)
        .order_by(batches.c.expires_at)
    )
    with database.reading() as connection:
        rate = _lines_per_s(connection, now)
        num_left = 0
        for num_of_batch, expires_at in connection.execute(query) if rate else ():
            num_left += num_of_batch
            if now + num_left / rate > expires_at:
                return True
    return False


def cancel(database: Database, owner: str, batch_id: str, now: float) -> dict[str, Any]:
    """Send nothing more of a batch.

    Raises:
        NotFound: the client has no such batch.
        Conflict: the batch has ended.
    """
    with database.writing() as connection:
        row = locked(connection, batch_id)
        if row is None or row.owner != owner:
            raise NotFound(f"No such batch: {batch_id}.")
        if row.status not in OPEN:
            raise Conflict(f"{batch_id} is {row.status} and cannot be cancelled.")
        if row.status == Status.IN_PROGRESS:
            change(connection, batch_id, Status.CANCELLING, cancelling_at=now)
            waiting = sa.and_(claims.c.batch_id == batch_id, claims.c.worker_id.is_(None))
            connection.execute(sa.delete(claims).where(waiting))
            end_if_over(connection, batch_id, now)
    return get(database, owner, batch_id, now)


def locked(connection: sa.Connection, batch_id: str) -> Any:
    """The row of a batch, which nobody else changes before this transaction ends."""
    query = sa.select(batches).where(batches.c.batch_id == batch_id).with_for_update()
    return connection.execute(query).one_or_none()


def change(connection: sa.Connection, batch_id: str, status: Status, **values: Any) -> None:
    """Put a batch into another state."""
    connection.execute(
        sa.update(batches)
        .where(batches.c.batch_id == batch_id)
        .values(status=status.value, **values)
    )


def end_if_over(connection: sa.Connection, batch_id: str, now: float) -> None:
    """End a batch whose lines have all ended, or that is being cancelled and has none in flight."""
    row = locked(connection, batch_id)
    status = Status(row.status)
    if row.completed + row.failed == row.total:
        status = after(status, Event.ALL_ENDED)
    elif not connection.scalar(
        sa.select(sa.func.count()).where(
            claims.c.batch_id == batch_id, claims.c.worker_id.is_not(None)
        )
    ):
        status = after(status, Event.NONE_IN_FLIGHT)
    if status != row.status:
        connection.execute(sa.delete(claims).where(claims.c.batch_id == batch_id))
        change(connection, batch_id, status, ended_at=now)
