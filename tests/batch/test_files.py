"""A file is never held whole: neither as it is uploaded nor as it is read."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

from llumsched.batch import files
from llumsched.batch.app import PART_LINES
from llumsched.batch.database import Database
from llumsched.batch.lines import split_lines
from tests.batch.servers import input_line

FEW, MANY = 2_000, 10_000
PADDING = "x" * 500


def test_memory_does_not_grow_with_the_lines(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/batch.db")
    database.create()
    asyncio.run(_round_trip(database, FEW))
    few = _peak_bytes(database, FEW)
    many = _peak_bytes(database, MANY)
    database.close()
    whole = MANY * len(input_line(MANY, padding=PADDING))
    assert many < 1.5 * few
    assert many < whole / 2


def _peak_bytes(database: Database, num_lines: int) -> int:
    tracemalloc.start()
    try:
        asyncio.run(_round_trip(database, num_lines))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


async def _round_trip(database: Database, num_lines: int) -> None:
    upload = files.Upload(database, "", "a", 0.0, num_lines)
    part: list[tuple[int, bytes]] = []
    async for numbered in split_lines(_chunks(num_lines)):
        part.append(numbered)
        if len(part) == PART_LINES:
            upload.add(part)
            part = []
    upload.add(part)
    file_id = upload.finish()["id"]
    row = files.get(database, "", file_id)
    assert sum(page.count(b"\n") for page in files.content(database, row)) == num_lines


async def _chunks(num_lines: int) -> AsyncIterator[bytes]:
    for number in range(num_lines):
        yield input_line(number, padding=PADDING).encode() + b"\n"
