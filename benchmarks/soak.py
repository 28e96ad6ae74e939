"""Faults of every kind at random moments under load, on real instances.

Clients stream answers of many kinds (greedy, seeded, with penalties, with logprobs, guided), one
after the other, while requests are moved by hand and, every 20 seconds on average, something
happens to one of two instances or to the scheduler. Every answer must be, to the letter, what the
same pool answered before. It is the test `tests/chaos/test_soak.py`; `make soak` runs it alone.

Memory is the frontend's, compared once a third of the time has passed, when everything that is
built only once has been.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._report import Figure, Report, Table, main

BENCHMARK = "Soak"

SOAK_S = 600.0
QUICK_SOAK_S = 60.0
TEST = "tests/chaos/test_soak.py"


def run(quick: bool) -> Report:
    soaked = _soak(QUICK_SOAK_S if quick else SOAK_S)
    figures = [
        Figure(name="duration", value=soaked["duration_s"], unit="s"),
        Figure(
            name="answers that failed or differ",
            value=len(soaked["complaints"]),
            unit=f"of {soaked['num_streams']}",
            at_most=0,
        ),
        Figure(name="tokens compared", value=soaked["num_tokens"], unit=""),
        Figure(name="faults", value=sum(soaked["faults"].values()), unit=""),
        Figure(name="requests resumed elsewhere", value=soaked["num_resumptions"], unit=""),
        Figure(name="requests moved", value=soaked["num_moves"], unit=""),
        Figure(
            name="memory of the frontend at the end over that after a third",
            value=soaked["num_bytes"] / soaked["settled_num_bytes"],
            unit="",
            at_most=1.2,
        ),
    ]
    faults = sorted(soaked["faults"].items())
    table = Table(title="Faults", columns=["what", "times"], rows=[list(f) for f in faults])
    return Report(figures=figures, tables=[table], notes=[f"Seed: {soaked['seed']}."])


def _soak(seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "soak.json"
        environment = os.environ | {
            "LLUMSCHED_SOAK_S": f"{seconds:g}",
            "LLUMSCHED_SOAK_JSON": str(path),
        }
        # A failure is reported by its figures; one before there are any ends this.
        subprocess.run(
            [sys.executable, "-m", "pytest", "-s", "-o", "faulthandler_timeout=0", TEST],
            cwd=Path(__file__).parents[1],
            env=environment,
            check=False,
        )
        soaked: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return soaked


if __name__ == "__main__":
    sys.exit(main(run))
