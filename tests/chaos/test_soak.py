"""Faults of every kind at random moments under load, for as long as ``LLUMSCHED_SOAK_S`` says.

Prints what was done and seen. The form that is part of every run is too short to say anything of
memory: that is compared once the first instances have been replaced, when everything that is built
only once has been.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.chaos.faults import FaultyPool
from tests.chaos.load import Load, References
from tests.chaos.test_faults import FAULTS
from tests.e2e.moving import move

SHORT_S = 20.0
SOAK_S = float(os.environ.get("LLUMSCHED_SOAK_S", SHORT_S))
SEED = int(os.environ.get("LLUMSCHED_SOAK_SEED", "0"))
# Where what was done and seen is written as well.
RESULT = os.environ.get("LLUMSCHED_SOAK_JSON")
NUM_CLIENTS = 6
MEAN_FAULT_INTERVAL_S = 20.0
# However short it is, something happens.
FIRST_FAULT_S = SOAK_S / 4
MOVE_INTERVAL_S = 0.5
MAX_GROWTH = 1.2


def move_one(pool: FaultyPool, rng: random.Random) -> None:
    """Try to move a random request."""
    requests = [r for r in pool.requests() if r["num_output_tokens"]]
    if requests:
        move(pool, rng.choice(requests)["request_id"])


def test_soak(pool: FaultyPool, references: References) -> None:
    rng = random.Random(SEED)
    (frontend,) = pool.frontends().values()
    server = psutil.Process(frontend["pid"])
    faults: Counter[str] = Counter()
    settled_num_bytes = 0
    load = Load(pool, references, num_clients=NUM_CLIENTS, seed=SEED)
    started_s = time.monotonic()
    next_fault_s = started_s + min(FIRST_FAULT_S, rng.expovariate(1 / MEAN_FAULT_INTERVAL_S))
    try:
        while (now_s := time.monotonic()) < started_s + SOAK_S:
            time.sleep(MOVE_INTERVAL_S)
            move_one(pool, rng)
            # One at a time: with none left there is nowhere to go on.
            if now_s >= next_fault_s and len(pool.serving()) >= 2:
                fault = rng.choice(FAULTS)
                faults[fault.__name__] += 1
                fault(pool, rng)
                next_fault_s = now_s + rng.expovariate(1 / MEAN_FAULT_INTERVAL_S)
            if not settled_num_bytes and now_s > started_s + SOAK_S / 3:
                settled_num_bytes = server.memory_info().rss
    finally:
        load.stop()
    num_bytes = server.memory_info().rss
    pool.await_serving(2)
    result = {
        "duration_s": SOAK_S,
        "seed": SEED,
        "num_streams": load.num_streams,
        "num_tokens": load.num_tokens,
        "complaints": load.complaints,
        "num_moves": int(pool.metric("llumsched_moves_total")),
        "num_resumptions": int(pool.metric("llumsched_resumptions_total")),
        "faults": dict(faults),
        "settled_num_bytes": settled_num_bytes,
        "num_bytes": num_bytes,
    }
    sys.stdout.write(f"\n{json.dumps(result)}\n")
    if RESULT is not None:
        Path(RESULT).write_text(json.dumps(result), encoding="utf-8")
    assert not load.complaints, load.complaints[:20]
    assert load.num_streams
    assert faults
    assert SOAK_S == SHORT_S or num_bytes < settled_num_bytes * MAX_GROWTH
