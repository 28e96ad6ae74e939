"""Files: what is uploaded is checked and kept line by line; what batches make is read from tables.

Invariant: a file of status `processed` is whole and every line of it can be sent. One that is still
`uploading` is nobody's to read, and is removed when its upload fails or is abandoned.
Every function is one or a few short transactions and blocks: an event loop calls them in a thread.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from llumsched.batch import lines as line_format
from llumsched.batch.database import Database, batches, files, lines, outcomes
from llumsched.batch.states import OPEN

MOST_ERRORS = 20
ABANDONED_S = 24 * 3600.0
PAGE_LINES = 500
PURPOSE = "batch"
OUTPUT, ERRORS = "batch_output", "batch_error"


class NotFound(Exception):
    """No such file or batch is this client's; the message says so."""


class Conflict(Exception):
    """The file or batch cannot be changed so now; the message says why."""


class UploadError(ValueError):
    """An upload is refused: `errors` has (line number, message) pairs, at most `MOST_ERRORS`."""

    def __init__(self, errors: Sequence[tuple[int, str]], num_errors: int) -> None:
        said = "; ".join(f"line {number}: {message}" for number, message in errors)
        more = "" if num_errors <= len(errors) else f"; and {num_errors - len(errors)} more"
        super().__init__(f"The file cannot be used: {said}{more}.")
        self.errors = tuple(errors)


class Upload:
    """A file that is being uploaded: `add` parts of it in order, then `finish`, or `abandon`."""

    def __init__(
        self, database: Database, owner: str, filename: str, now: float, most_lines: int
    ) -> None:
        self.file_id = f"file-{uuid.uuid4().hex}"
        self._database = database
        self._most_lines = most_lines
        self._num_lines = self._num_bytes = self._num_errors = 0
        self._errors: list[tuple[int, str]] = []
        self._endpoints: set[str] = set()
        row = {
            "file_id": self.file_id,
            "owner": owner,
            "filename": filename,
            "purpose": PURPOSE,
            "status": "uploading",
            "created_at": now,
        }
        with database.writing() as connection:
            connection.execute(sa.insert(files), row)

    def add(self, part: Sequence[tuple[int, bytes]]) -> None:
        """Check lines (number in the file, bytes) and keep those that are right.

        Raises:
            UploadError: so many are wrong, or there are so many, that no more need be sent.
        """
        rows = []
        for line_number, text in part:
            self._num_lines += 1
            self._num_bytes += len(text) + 1
            try:
                parsed = line_format.parse_line(text)
            except line_format.LineError as error:
                self._wrong(line_number, str(error))
                continue
            self._endpoints.add(parsed.url)
            rows.append(
                {
                    "file_id": self.file_id,
                    "position": self._num_lines,
                    "line_number": line_number,
                    "custom_id": parsed.custom_id,
                    "text": text,
                }
            )
        if self._num_lines > self._most_lines:
            self._wrong(part[-1][0], f"a file may have at most {self._most_lines:,} lines")
        if self._num_errors > MOST_ERRORS or self._num_lines > self._most_lines:
            raise UploadError(self._errors, self._num_errors)
        if rows and not self._errors:
            with self._database.writing() as connection:
                connection.execute(sa.insert(lines), rows)

    def finish(self) -> dict[str, Any]:
        """The file, which can be used from now on.

        Raises:
            UploadError: lines of it are wrong; the file is not kept.
        """
        if not self._errors:
            if not self._num_lines:
                self._wrong(1, "the file has no lines")
            else:
                self._find_doubles()
        if self._errors:
            raise UploadError(self._errors, self._num_errors)
        (endpoint, *others) = sorted(self._endpoints)
        values = {
            "status": "processed",
            "num_lines": self._num_lines,
            "num_bytes": self._num_bytes,
            "endpoint": "" if others else endpoint,
        }
        with self._database.writing() as connection:
            connection.execute(
                sa.update(files).where(files.c.file_id == self.file_id).values(values)
            )
            row = connection.execute(sa.select(files).where(files.c.file_id == self.file_id)).one()
        return describe(row)

    def abandon(self) -> None:
        """Remove what has been kept so far."""
        _remove(self._database, self.file_id)

    def _wrong(self, line_number: int, message: str) -> None:
        self._num_errors += 1
        if len(self._errors) < MOST_ERRORS:
            self._errors.append((line_number, message))

    def _find_doubles(self) -> None:
        # The database sorts them, on disk where they are many.
        query = (
            sa.select(
                lines.c.custom_id,
                sa.func.min(lines.c.line_number),
                sa.func.max(lines.c.line_number),
            )
            .where(lines.c.file_id == self.file_id)
            .group_by(lines.c.custom_id)
            .having(sa.func.count() > 1)
            .limit(MOST_ERRORS)
        )
        with self._database.reading() as connection:
            for custom_id, first, last in connection.execute(query):
                self._wrong(last, f"'custom_id' {custom_id!r} is that of line {first} as well")


def _remove(database: Database, file_id: str) -> None:
    """Remove a file with its lines, some at a time, so that others write in between."""
    with database.writing() as connection:
        connection.execute(sa.delete(files).where(files.c.file_id == file_id))
    while True:
        with database.writing() as connection:
            last = connection.scalar(
                sa.select(lines.c.position)
                .where(lines.c.file_id == file_id)
                .order_by(lines.c.position)
                .limit(1)
            )
            if last is None:
                return
            connection.execute(
                sa.delete(lines).where(
                    lines.c.file_id == file_id, lines.c.position < last + 20 * PAGE_LINES
                )
            )


def remove_abandoned(database: Database, now: float) -> None:
    """Remove uploads that were begun a day ago and never finished."""
    query = sa.select(files.c.file_id).where(
        files.c.status == "uploading", files.c.created_at < now - ABANDONED_S
    )
    with database.reading() as connection:
        abandoned = connection.scalars(query).all()
    for file_id in abandoned:
        _remove(database, file_id)


def describe(row: Any) -> dict[str, Any]:
    """A file as OpenAI's API has it."""
    return {
        "id": row.file_id,
        "object": "file",
        "bytes": row.num_bytes,
        "created_at": int(row.created_at),
        "filename": row.filename,
        "purpose": PURPOSE if row.purpose == PURPOSE else OUTPUT,
        "status": row.status,
    }


def get(database: Database, owner: str, file_id: str) -> Any:
    """The row of a file.

    Raises:
        NotFound: the client has no such file.
    """
    query = sa.select(files).where(
        files.c.file_id == file_id, files.c.owner == owner, files.c.status == "processed"
    )
    with database.reading() as connection:
        row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound(f"No such file: {file_id}.")
    return row


def list_page(
    database: Database,
    owner: str,
    *,
    purpose: str | None,
    after: str | None,
    limit: int,
    is_ascending: bool,
) -> tuple[list[dict[str, Any]], bool]:
    """Files of a client by the time of their making, and whether there are more.

    Raises:
        NotFound: there is no file `after`.
    """
    query = sa.select(files).where(files.c.owner == owner, files.c.status == "processed")
    if purpose is not None:
        kept = {PURPOSE: [PURPOSE], OUTPUT: [OUTPUT, ERRORS]}.get(purpose, [])
        query = query.where(files.c.purpose.in_(kept))
    key = sa.tuple_(files.c.created_at, files.c.file_id)
    if after is not None:
        last = get(database, owner, after)
        bound = sa.tuple_(sa.literal(last.created_at), sa.literal(last.file_id))
        query = query.where(key > bound if is_ascending else key < bound)
    for column in (files.c.created_at, files.c.file_id):
        query = query.order_by(column.asc() if is_ascending else column.desc())
    with database.reading() as connection:
        rows = connection.execute(query.limit(limit + 1)).all()
    return [describe(row) for row in rows[:limit]], len(rows) > limit


def delete(database: Database, owner: str, file_id: str) -> None:
    """Remove a file; of a batch's own file, the outcomes that it shows.

    Raises:
        NotFound: the client has no such file.
        Conflict: a batch still needs it.
    """
    row = get(database, owner, file_id)
    batch_id = row.batch_id
    with database.writing() as connection:
        using = connection.scalar(
            sa.select(batches.c.batch_id)
            .where(
                batches.c.batch_id == batch_id if batch_id else batches.c.input_file_id == file_id,
                batches.c.status.in_(OPEN),
            )
            .limit(1)
        )
        if using is not None:
            raise Conflict(f"{using} needs the file {file_id}: cancel it, or wait for its end.")
        if batch_id:
            connection.execute(
                sa.delete(outcomes).where(
                    outcomes.c.batch_id == batch_id,
                    outcomes.c.is_success == (row.purpose == OUTPUT),
                )
            )
        connection.execute(sa.delete(files).where(files.c.file_id == file_id))
    _remove(database, file_id)


def content(database: Database, row: Any) -> Iterator[bytes]:
    """The lines of a file, in pages; of a batch's file in the order of its input."""
    position = 0
    while True:
        if row.purpose == PURPOSE:
            page = _input_page(database, row.file_id, position)
        else:
            page = _outcome_page(database, row, position)
        if not page:
            return
        position = page[-1][0]
        yield b"".join(text + b"\n" for _, text in page)


def _input_page(database: Database, file_id: str, after: int) -> list[tuple[int, bytes]]:
    query = (
        sa.select(lines.c.position, lines.c.text)
        .where(lines.c.file_id == file_id, lines.c.position > after)
        .order_by(lines.c.position)
        .limit(PAGE_LINES)
    )
    with database.reading() as connection:
        return [(position, text) for position, text in connection.execute(query)]


def _outcome_page(database: Database, row: Any, after: int) -> list[tuple[int, bytes]]:
    with database.reading() as connection:
        batch = connection.execute(
            sa.select(batches).where(batches.c.batch_id == row.batch_id)
        ).one()
        if row.purpose == ERRORS and batch.status == "expired":
            return _page_of_expired(connection, batch, after)
        query = (
            sa.select(outcomes.c.position, outcomes.c.text)
            .where(
                outcomes.c.batch_id == row.batch_id,
                outcomes.c.position > after,
                outcomes.c.is_success == (row.purpose == OUTPUT),
            )
            .order_by(outcomes.c.position)
            .limit(PAGE_LINES)
        )
        return [(position, text.encode()) for position, text in connection.execute(query)]


def _page_of_expired(connection: sa.Connection, batch: Any, after: int) -> list[tuple[int, bytes]]:
    """Failures, and every line that came to no end before the deadline."""
    of_batch = sa.and_(
        outcomes.c.batch_id == batch.batch_id, outcomes.c.position == lines.c.position
    )
    query = (
        sa.select(lines.c.position, lines.c.custom_id, outcomes.c.text)
        .select_from(lines.outerjoin(outcomes, of_batch))
        .where(
            lines.c.file_id == batch.input_file_id,
            lines.c.position > after,
            sa.or_(outcomes.c.is_success.is_(None), outcomes.c.is_success.is_(False)),
        )
        .order_by(lines.c.position)
        .limit(PAGE_LINES)
    )
    found = []
    for position, custom_id, text in connection.execute(query):
        if text is None:
            text = line_format.unanswered(
                custom_id, line_format.EXPIRED, line_format.EXPIRED_MESSAGE
            )
        found.append((position, text.encode()))
    return found
