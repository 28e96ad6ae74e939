"""Jobs and their runs in the database: what is due, what runs, and what became of it.

Invariants:

- a job has at most one run for a time, a shard and a cause, so that several processes, and one that
  starts again, begin it once;
- a run ends, or waits to be tried again, by the process that holds it and no other; what follows
  from its end is written in the same transaction;
- a run is held under the lease of its process's worker (`batch.claiming`).

Every function blocks: an event loop calls them in a thread.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from llumsched.batch.database import Database, metadata, workers
from llumsched.batch.files import NotFound
from llumsched.jobs.spec import Job, SpecError, check_all
from llumsched.jobs.timing import all_ended, decide, is_in_window, next_due, num_missed

WAITING, RUNNING = "waiting", "running"
SUCCEEDED, FAILED, SKIPPED = "succeeded", "failed", "skipped"
SCHEDULE, MANUAL, DEPENDENCY = "schedule", "manual", "dependency"
MOST_MESSAGE = 4000
KEPT_S = 90 * 86_400.0
"""How long the history is kept."""

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("spec", sa.LargeBinary, nullable=False),
    # file: kept as long as the YAML file has it; api: until it is deleted.
    sa.Column("source", sa.String(8), nullable=False),
    sa.Column("is_paused", sa.Boolean, nullable=False),
    sa.Column("decided_until", sa.Float, nullable=False),
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("run_id", sa.String(64), primary_key=True),
    sa.Column("job", sa.String(100), nullable=False),
    sa.Column("due_at", sa.Float, nullable=False),
    sa.Column("shard", sa.String(200), nullable=False),
    sa.Column("cause", sa.String(16), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("num_failures", sa.Integer, nullable=False, default=0),
    sa.Column("claim_number", sa.Integer, nullable=False, default=0),
    sa.Column("not_before", sa.Float, nullable=False),
    sa.Column("worker_id", sa.String(64)),
    sa.Column("started_at", sa.Float),
    sa.Column("ended_at", sa.Float),
    sa.UniqueConstraint("job", "due_at", "shard", "cause"),
    sa.Index("runs_by_state", "state", "not_before"),
)

log = sa.Table(
    "run_log",
    metadata,
    sa.Column("entry", sa.Integer, primary_key=True),
    sa.Column("run_id", sa.String(64), nullable=False, index=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
)


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A run that this process is to do."""

    run_id: str
    job: Job
    due_at: float
    shard: str
    num_failures: int
    claim_number: int

    def outcome(self, *, is_success: bool) -> str:
        """State that a try which ends so leads to."""
        if is_success:
            return SUCCEEDED
        return WAITING if self.num_failures + 1 < self.job.retry.tries else FAILED


def spec_of(row: Any) -> Job:
    """The job of a row."""
    return msgspec.json.decode(row.spec, type=Job)


def put(connection: sa.Connection, job: Job, source: str, now: float) -> None:
    """Add a job, or change the one of its name: times before now are not made up for."""
    values: dict[str, Any] = {"spec": msgspec.json.encode(job), "source": source}
    row = connection.execute(sa.select(jobs).where(jobs.c.name == job.name)).one_or_none()
    if row is None:
        values |= {"name": job.name, "is_paused": False, "decided_until": now}
        connection.execute(sa.insert(jobs), values)
        return
    before = spec_of(row)
    if (before.cron, before.at, before.timezone) != (job.cron, job.at, job.timezone):
        values["decided_until"] = now
    connection.execute(sa.update(jobs).where(jobs.c.name == job.name).values(values))


def put_file(database: Database, found: Mapping[str, Job], now: float) -> None:
    """Have the jobs of the file, beside those of the API.

    Raises:
        SpecError: they do not fit together.
    """
    with database.writing() as connection:
        rows = connection.execute(sa.select(jobs)).all()
        others = [spec_of(row) for row in rows if row.source == "api"]
        check_all([*found.values(), *others])
        for row in rows:
            if row.source == "file" and row.name not in found:
                connection.execute(sa.delete(jobs).where(jobs.c.name == row.name))
        for job in found.values():
            put(connection, job, "file", now)


def put_one(database: Database, job: Job, now: float) -> None:
    """Add or change a job by the API.

    Raises:
        SpecError: the job does not fit to the others, or is the file's.
    """

    with database.writing() as connection:
        rows = {row.name: row for row in connection.execute(sa.select(jobs))}
        if job.name in rows and rows[job.name].source == "file":
            raise SpecError(f"{job.name}: the job is the file's: change it there")
        others = [spec_of(row) for name, row in rows.items() if name != job.name]
        check_all([*others, job])
        put(connection, job, "api", now)


def delete(database: Database, name: str) -> None:
    """Remove a job of the API; its history stays.

    Raises:
        NotFound: there is none of this name.
        SpecError: others wait for it.
    """
    with database.writing() as connection:
        _row(connection, name)
        rows = connection.execute(sa.select(jobs).where(jobs.c.name != name))
        check_all(spec_of(row) for row in rows)
        connection.execute(sa.delete(jobs).where(jobs.c.name == name))
        connection.execute(sa.delete(runs).where(runs.c.job == name, runs.c.state == WAITING))


def _row(connection: sa.Connection, name: str) -> Any:
    query = sa.select(jobs).where(jobs.c.name == name).with_for_update()
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound(f"There is no job '{name}'.")
    return row


def pause(database: Database, name: str, now: float, *, is_paused: bool) -> None:
    """Let a job begin no runs, or again; times that pass meanwhile are not made up for.

    Raises:
        NotFound: there is no such job.
    """
    with database.writing() as connection:
        row = _row(connection, name)
        if row.is_paused != is_paused:
            values: dict[str, Any] = {"is_paused": is_paused}
            if not is_paused:
                values["decided_until"] = now
            connection.execute(sa.update(jobs).where(jobs.c.name == name).values(values))


def run_now(database: Database, name: str, now: float) -> list[str]:
    """Begin runs of a job now, whatever its times say, also while it is paused; their ids.

    Raises:
        NotFound: there is no such job.
    """
    with database.writing() as connection:
        return _add_runs(connection, database, spec_of(_row(connection, name)), now, MANUAL, now)


def _add_runs(
    connection: sa.Connection,
    database: Database,
    job: Job,
    due_at: float,
    cause: str,
    now: float,
    skipped_for: str | None = None,
) -> list[str]:
    run_ids = []
    for shard in job.shards:
        run_id = f"run-{uuid.uuid4().hex[:16]}"
        row = {
            "run_id": run_id,
            "job": job.name,
            "due_at": due_at,
            "shard": shard,
            "cause": cause,
            "state": WAITING if skipped_for is None else SKIPPED,
            "not_before": now,
            "ended_at": None if skipped_for is None else now,
        }
        if connection.execute(database.insert_new(runs).values(row)).rowcount:
            run_ids.append(run_id)
            if skipped_for is not None:
                _say(connection, run_id, now, f"skipped: {skipped_for}")
    return run_ids


def _say(connection: sa.Connection, run_id: str, now: float, message: str) -> None:
    row = {"run_id": run_id, "at": now, "message": message[:MOST_MESSAGE]}
    connection.execute(sa.insert(log), row)


def say(database: Database, run_id: str, now: float, message: str) -> None:
    """Add a line to the log of a run."""
    with database.writing() as connection:
        _say(connection, run_id, now, message)


def begin_due(database: Database, now: float, missed: Counter[str] | None = None) -> int:
    """Add the runs that are due; how many.

    Args:
        missed: is given the number of times that each job has missed.
    """
    with database.reading() as connection:
        rows = connection.execute(sa.select(jobs).where(jobs.c.is_paused.is_(False))).all()
    num_added = 0
    for row in rows:
        job = spec_of(row)
        time = next_due(job, row.decided_until)
        if time is None or time > now:
            continue
        due = decide(job, row.decided_until, now)
        with database.writing() as connection:
            # Another process, or somebody who pauses it, may have been here first.
            decided = connection.execute(
                sa.update(jobs)
                .where(
                    jobs.c.name == job.name,
                    jobs.c.decided_until == row.decided_until,
                    jobs.c.is_paused.is_(False),
                )
                .values(decided_until=now)
            )
            if decided.rowcount:
                if missed is not None and (number := num_missed(job, row.decided_until, now)):
                    missed[job.name] += number
                for due_at in due:
                    num_added += len(_add_runs(connection, database, job, due_at, SCHEDULE, now))
    return num_added


def take(database: Database, worker_id: str, now: float, most: int = 16) -> list[Run]:
    """Runs for this process to do: in order of their times, within windows and limits."""
    with database.reading() as connection:
        query = (
            sa.select(runs.c.run_id, jobs)
            .join(jobs, jobs.c.name == runs.c.job)
            .where(
                runs.c.state == WAITING,
                runs.c.not_before <= now,
                sa.or_(jobs.c.is_paused.is_(False), runs.c.cause == MANUAL),
            )
            .order_by(runs.c.due_at, runs.c.job, runs.c.shard)
        )
        # A window may hold many back: all are looked at, few are taken.
        candidates = [
            (row.run_id, spec_of(row))
            for row in connection.execute(query)
            if is_in_window(spec_of(row), now)
        ]
    found: list[Run] = []
    for run_id, job in candidates:
        if len(found) >= most:
            break
        with database.writing() as connection:
            # The job's row is the lock of the job's limit.
            connection.execute(
                sa.select(jobs.c.name).where(jobs.c.name == job.name).with_for_update()
            )
            num_running = connection.scalar(
                sa.select(sa.func.count()).where(runs.c.job == job.name, runs.c.state == RUNNING)
            )
            if num_running is not None and num_running >= job.most_running:
                continue
            taken = connection.execute(
                sa.update(runs)
                .where(runs.c.run_id == run_id, runs.c.state == WAITING)
                .values(
                    state=RUNNING,
                    worker_id=worker_id,
                    claim_number=runs.c.claim_number + 1,
                    started_at=sa.func.coalesce(runs.c.started_at, now),
                )
            )
            if not taken.rowcount:
                continue
            row = connection.execute(sa.select(runs).where(runs.c.run_id == run_id)).one()
            _say(connection, run_id, now, f"begun, try {row.num_failures + 1}")
            found.append(
                Run(
                    run_id=run_id,
                    job=job,
                    due_at=row.due_at,
                    shard=row.shard,
                    num_failures=row.num_failures,
                    claim_number=row.claim_number,
                )
            )
    return found


def end(
    database: Database, worker_id: str, run: Run, now: float, *, is_success: bool, message: str
) -> bool:
    """Write how a run ended, or that it is to be tried again, and begin what waited for it.

    Returns:
        False if the run is another process's by now: then nothing is written.
    """
    job = run.job
    state = run.outcome(is_success=is_success)
    is_again = state == WAITING
    values: dict[str, Any] = {"worker_id": None}
    if is_again:
        wait_s = job.retry.wait_s * 2**run.num_failures
        values |= {
            "state": state,
            "num_failures": run.num_failures + 1,
            "not_before": now + wait_s,
        }
        message = f"failed, tried again in {wait_s:g} s: {message}"
    else:
        num_failures = run.num_failures + (not is_success)
        values |= {"state": state, "ended_at": now, "num_failures": num_failures}
        message = f"{state}: {message}" if message else state
    with database.writing() as connection:
        ended = connection.execute(
            sa.update(runs)
            .where(
                runs.c.run_id == run.run_id,
                runs.c.state == RUNNING,
                runs.c.worker_id == worker_id,
                runs.c.claim_number == run.claim_number,
            )
            .values(values)
        )
        if not ended.rowcount:
            return False
        _say(connection, run.run_id, now, message)
        if not is_again:
            _follow(connection, database, job.name, run.due_at, now)
    return True


def _follow(
    connection: sa.Connection, database: Database, name: str, due_at: float, now: float
) -> None:
    """Begin, or skip, the jobs that waited for this one and wait for nothing else."""
    every = [
        spec_of(row)
        for row in connection.execute(sa.select(jobs).order_by(jobs.c.name).with_for_update())
    ]
    for job in every:
        if name not in job.after:
            continue
        states = {
            upstream: connection.scalars(
                sa.select(runs.c.state).where(runs.c.job == upstream, runs.c.due_at == due_at)
            ).all()
            for upstream in job.after
        }
        if not all(map(all_ended, states.values())):
            continue
        bad = [
            upstream
            for upstream, found in states.items()
            if any(state != SUCCEEDED for state in found)
        ]
        reason = f"{', '.join(bad)} did not succeed" if bad else None
        added = _add_runs(connection, database, job, due_at, DEPENDENCY, now, reason)
        if bad and added:
            _follow(connection, database, job.name, due_at, now)


def free_lost(database: Database, now: float) -> int:
    """Let runs of processes that are gone be begun again; how many. They count as no failure."""
    is_live = sa.exists().where(
        workers.c.worker_id == runs.c.worker_id, workers.c.lease_until > now
    )
    is_lost = sa.and_(runs.c.state == RUNNING, sa.not_(is_live))
    with database.reading() as connection:
        lost = connection.scalars(sa.select(runs.c.run_id).where(is_lost)).all()
    num_freed = 0
    for run_id in lost:
        with database.writing() as connection:
            freed = connection.execute(
                sa.update(runs)
                .where(runs.c.run_id == run_id, is_lost)
                .values(state=WAITING, worker_id=None, not_before=now)
            )
            if freed.rowcount:
                num_freed += 1
                _say(connection, run_id, now, "its process is gone: begun again")
    return num_freed


def forget_old(database: Database, now: float) -> None:
    """Remove runs that ended long ago, and their logs."""
    old = sa.select(runs.c.run_id).where(runs.c.ended_at < now - KEPT_S)
    with database.writing() as connection:
        connection.execute(sa.delete(log).where(log.c.run_id.in_(old)))
        connection.execute(sa.delete(runs).where(runs.c.ended_at < now - KEPT_S))


def describe_jobs(database: Database, now: float) -> list[dict[str, Any]]:
    """Every job, with its next time and its last run."""
    with database.reading() as connection:
        rows = connection.execute(sa.select(jobs).order_by(jobs.c.name)).all()
        return [_describe_job(connection, row, now) for row in rows]


def _describe_job(connection: sa.Connection, row: Any, now: float) -> dict[str, Any]:
    job = spec_of(row)
    last = connection.execute(
        sa.select(runs.c.run_id, runs.c.state, runs.c.due_at)
        .where(runs.c.job == job.name)
        .order_by(runs.c.due_at.desc(), runs.c.shard)
        .limit(1)
    ).one_or_none()
    return {
        "name": job.name,
        "source": row.source,
        "is_paused": row.is_paused,
        "next_due_at": None if row.is_paused else next_due(job, max(now, row.decided_until)),
        "last_run": None if last is None else dict(last._mapping),
        "spec": msgspec.to_builtins(job),
    }


def history(database: Database, name: str, limit: int) -> list[dict[str, Any]]:
    """The latest runs of a job, the youngest first."""
    with database.reading() as connection:
        query = sa.select(runs).where(runs.c.job == name)
        query = query.order_by(runs.c.due_at.desc(), runs.c.shard).limit(limit)
        return [_describe_run(row) for row in connection.execute(query)]


def describe_run(database: Database, run_id: str) -> dict[str, Any]:
    """A run with its log.

    Raises:
        NotFound: there is none.
    """
    with database.reading() as connection:
        row = connection.execute(sa.select(runs).where(runs.c.run_id == run_id)).one_or_none()
        if row is None:
            raise NotFound(f"There is no run '{run_id}'.")
        said = connection.execute(
            sa.select(log.c.at, log.c.message).where(log.c.run_id == run_id).order_by(log.c.entry)
        )
        return {**_describe_run(row), "log": [dict(line._mapping) for line in said]}


def _describe_run(row: Any) -> dict[str, Any]:
    kept = ("run_id", "job", "due_at", "shard", "cause", "state", "num_failures")
    return {key: getattr(row, key) for key in (*kept, "started_at", "ended_at")}
