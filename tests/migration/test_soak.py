"""Migrations in a row, of all kinds of requests: each answer is right, and memory, descriptors and
blocks are at the end what they were near the beginning.

``LLUMSCHED_MIGRATIONS=1000 pytest -s tests/migration/test_soak.py`` is the long form.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.migration.answers import seen_by_client
from tests.migration.cases import CASES
from tests.migration.pool import Pool

NUM_MIGRATIONS = int(os.environ.get("LLUMSCHED_MIGRATIONS", "30"))
NUM_REQUESTS = 6
# Allocators keep what they have had once: growth counts from here on.
SETTLED_SHARE = 0.3
MAX_GROWTH_BYTES = 24 << 20
SHARED_MEMORY = Path("/dev/shm")


def test_nothing_is_left_of_many_migrations(pool: Pool, unmoved: dict[str, Any]) -> None:
    many_migrations(pool, unmoved, NUM_MIGRATIONS)


def many_migrations(pool: Pool, unmoved: Mapping[str, Any], num_migrations: int) -> None:
    """Move requests at random; each answer must be right, and nothing be left at the end."""
    indices = range(len(pool.instances))
    chance = random.Random(1)
    process = psutil.Process()
    for source, destination in itertools.permutations(indices, 2):
        pool.connect(source, destination)
    num_descriptors = process.num_fds()
    segments = set(SHARED_MEMORY.iterdir())
    outcomes: Counter[str] = Counter()
    names: dict[str, str] = {}
    sequences: dict[str, list[str]] = {}
    num_sent = num_answered = memory_bytes = 0

    def send() -> None:
        nonlocal num_sent
        name = chance.choice(list(unmoved))
        request_id = f"{num_sent} {name}"
        num_sent += 1
        names[request_id] = name
        case = CASES[name]
        sequences[request_id] = pool.submit(
            request_id,
            case.prompt(pool.tokenizer),
            case.params,
            at=chance.choice(indices),
            **case.fields,
        ).sequence_ids

    while sum(outcomes.values()) < num_migrations:
        while len(names) < NUM_REQUESTS:
            send()
        moves = []
        for sequence_id in (s for ids in sequences.values() for s in ids):
            route = pool.routes.get(sequence_id)
            if route is not None and route.num_tokens > 0 and chance.random() < 0.5:
                here = pool.where(sequence_id)
                to = chance.choice([i for i in indices if i != here])
                moves.append(pool.start_move(sequence_id, to))
        pool.until(lambda m=moves: all(move.done() for move in m))  # type: ignore[misc]
        outcomes.update(move.result().outcome for move in moves)
        pool.step()
        pool.stats.clear()  # the pool's own record, which nobody reads here
        for request_id in [i for i in names if pool.answers[i].done]:
            (answer,) = pool.finish(request_id)
            del sequences[request_id]
            assert seen_by_client(answer) == unmoved[names.pop(request_id)], request_id
            num_answered += 1
        if not memory_bytes and sum(outcomes.values()) >= SETTLED_SHARE * num_migrations:
            gc.collect()
            memory_bytes = process.memory_info().rss
    pool.finish(*names)
    pool.settle()
    gc.collect()
    growth_bytes = process.memory_info().rss - memory_bytes
    sys.stdout.write(
        f"\n{sum(outcomes.values())} migrations ({dict(outcomes)}) of {num_sent} requests, "
        f"{num_answered} answers compared; resident memory grew by {growth_bytes / 2**20:.1f} MiB\n"
    )
    assert outcomes["committed"] > num_migrations // 2
    assert growth_bytes < MAX_GROWTH_BYTES
    assert process.num_fds() <= num_descriptors
    assert set(SHARED_MEMORY.iterdir()) <= segments
