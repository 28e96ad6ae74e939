"""The database of files, batches and jobs: SQLite by default, PostgreSQL by its URL.

Invariant: what belongs together is written in one transaction of `writing`. On SQLite it holds the
one write lock from its beginning, so that nothing read in it is out of date when it is written; on
PostgreSQL rows that are read to be changed are locked (`with_for_update`). Times are seconds since
the epoch, of the clock of the process that writes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import sqlalchemy as sa

DEFAULT_URL = "sqlite:///llumsched.db"
BUSY_TIMEOUT_S = 30.0
# A driver that is installed need not be named.
_DRIVER_OF = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}

metadata = sa.MetaData()
Text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

files = sa.Table(
    "files",
    metadata,
    sa.Column("file_id", sa.String(64), primary_key=True),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("filename", sa.Text, nullable=False),
    sa.Column("purpose", sa.String(32), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False, default=0),
    sa.Column("num_lines", sa.BigInteger, nullable=False, default=0),
    # The one endpoint that all lines name; empty where they differ.
    sa.Column("endpoint", sa.String(64), nullable=False, default=""),
    # Of a file that a batch has made.
    sa.Column("batch_id", sa.String(64)),
)

lines = sa.Table(
    "lines",
    metadata,
    sa.Column("file_id", sa.String(64), primary_key=True),
    # 1, 2, 3 ...: empty lines do not count here.
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("line_number", sa.BigInteger, nullable=False),
    sa.Column("custom_id", Text, nullable=False),
    sa.Column("text", sa.LargeBinary, nullable=False),
)

batches = sa.Table(
    "batches",
    metadata,
    sa.Column("batch_id", sa.String(64), primary_key=True),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("endpoint", sa.String(64), nullable=False),
    sa.Column("completion_window", sa.String(16), nullable=False),
    sa.Column("input_file_id", sa.String(64), nullable=False),
    sa.Column("output_file_id", sa.String(64), nullable=False),
    sa.Column("error_file_id", sa.String(64), nullable=False),
    sa.Column("metadata", sa.JSON),
    sa.Column("errors", sa.JSON),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
    sa.Column("in_progress_at", sa.Float),
    sa.Column("cancelling_at", sa.Float),
    sa.Column("ended_at", sa.Float),
    sa.Column("total", sa.BigInteger, nullable=False),
    # Lines up to this position have been claimed at least once.
    sa.Column("claimed_up_to", sa.BigInteger, nullable=False, default=0),
    sa.Column("completed", sa.BigInteger, nullable=False, default=0),
    sa.Column("failed", sa.BigInteger, nullable=False, default=0),
    sa.Index("batches_by_deadline", "status", "expires_at"),
)

# Lines in flight, and those that wait to be tried again: a line that has been begun and has no
# outcome has one row here, any other none.
claims = sa.Table(
    "claims",
    metadata,
    sa.Column("batch_id", sa.String(64), primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    # None while it waits.
    sa.Column("worker_id", sa.String(64)),
    # How often it has been claimed; tells a claim from an earlier one of the same worker.
    sa.Column("claim_number", sa.Integer, nullable=False),
    # How often it has been answered with a failure.
    sa.Column("num_failures", sa.Integer, nullable=False, default=0),
    sa.Column("not_before", sa.Float, nullable=False, default=0.0),
    sa.Index("claims_by_worker", "worker_id"),
)

outcomes = sa.Table(
    "outcomes",
    metadata,
    sa.Column("batch_id", sa.String(64), primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("is_success", sa.Boolean, nullable=False),
    # The line of the output or error file.
    sa.Column("text", sa.Text, nullable=False),
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("worker_id", sa.String(64), primary_key=True),
    sa.Column("lease_until", sa.Float, nullable=False),
    sa.Column("lines_per_s", sa.Float, nullable=False, default=0.0),
    sa.Column("num_in_flight", sa.Integer, nullable=False, default=0),
)


class DatabaseError(Exception):
    """A database cannot be used; the message names the fix."""


class Database:
    """See the module docstring."""

    def __init__(self, url: str = DEFAULT_URL) -> None:
        """Args:
        url: SQLAlchemy's, such as `sqlite:////var/lib/llumsched/batch.db` or
            `postgresql://user:password@host/name`.

        Raises:
            DatabaseError: nothing can be reached there.
        """
        name, _, rest = url.partition("://")
        kind = name.partition("+")[0]
        if kind not in ("sqlite", *_DRIVER_OF):
            raise DatabaseError(
                f"{url}: give SQLite's or PostgreSQL's URL, such as {DEFAULT_URL} or"
                " postgresql://host/name"
            )
        self.is_sqlite = kind == "sqlite"
        try:
            self.engine = sa.create_engine(f"{_DRIVER_OF.get(name, name)}://{rest}")
        except ModuleNotFoundError as error:
            raise DatabaseError(
                f"{name}: the driver {error.name} is not installed: pip install {error.name}"
            ) from error
        except sa.exc.ArgumentError as error:
            raise DatabaseError(
                f"{url}: give a database's URL, such as {DEFAULT_URL} or postgresql://host/name"
            ) from error
        if self.is_sqlite:
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)
            path = self.engine.url.database
            if path and path != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._writer = threading.Lock()
        self._reader = self.engine.execution_options(only_reads=True)

    def create(self) -> None:
        """Make the tables that are not there.

        Raises:
            DatabaseError: nothing can be reached there.
        """
        try:
            with self.writing() as connection:
                metadata.create_all(connection)
        except sa.exc.OperationalError as error:
            where = self.engine.url.render_as_string(hide_password=True)
            raise DatabaseError(f"{where}: {error.orig}") from error

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that is written whole, or not at all if the block raises."""
        # Threads of this process queue here; SQLite would have them poll.
        with self._writer if self.is_sqlite else nullcontext(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that writes nothing, and waits for nobody."""
        with self._reader.connect() as connection:
            yield connection

    def insert_new(self, table: sa.Table) -> Any:
        """An insertion that leaves a row that is there as it is."""
        if self.is_sqlite:
            from sqlalchemy.dialects.sqlite import insert as sqlite_insert

            return sqlite_insert(table).on_conflict_do_nothing()
        from sqlalchemy.dialects.postgresql import insert as postgresql_insert

        return postgresql_insert(table).on_conflict_do_nothing()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _prepare_sqlite(connection: Any, record: Any) -> None:
    # Transactions begin as `_begin_sqlite` says, not as the driver guesses.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
    # Readers and the one writer do not wait for one another.
    cursor.execute("PRAGMA journal_mode = WAL")
    # A process that is killed loses nothing; a machine that loses power may lose the last moments,
    # whose lines are then sent again, but no transaction in part.
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    only_reads = connection.get_execution_options().get("only_reads", False)
    connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")
