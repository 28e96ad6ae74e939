"""Vidur beside this simulator: the same trace, the same time of a step, one core each.

Vidur comes from the package index into an environment of its own, which is made for the occasion,
or is the one whose interpreter `LLUMSCHED_VIDUR_PYTHON` names. Where it cannot be had, the reason
is what the report says. The profiles that Vidur's steps are computed from are a download of their
own: here both simulators are given a line instead (`_vidur_driver`).
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

from benchmarks import _vidur_driver
from llumsched.config import Config
from llumsched.simulator.engines.cost import tokens_s
from llumsched.simulator.hardware.spec import Hardware, StepCoefficients
from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.simulation import simulate
from llumsched.simulator.traces.trace import Trace

NUM_INSTANCES = 8
INSTALL_LIMIT_S = 900.0
RUN_LIMIT_S = 1800.0
# A step of this many tokens is the constant of the line.
TYPICAL_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Processor seconds of both for one trace, and when the last request ended in each."""

    version: str
    num_requests: int
    vidur_s: float
    vidur_makespan_s: float
    ours_s: float
    ours_makespan_s: float


class VidurMissing(Exception):
    """Vidur could not be installed or did not run; the message is what was said."""


def beside(trace: Trace, hardware: Hardware, num_kv_blocks: int) -> Beside:
    """Simulate a trace with both, requests in turn on `NUM_INSTANCES` instances.

    Raises:
        VidurMissing: see there.
    """
    line = StepCoefficients(
        host_s=tokens_s(hardware.step, TYPICAL_TOKENS),
        request_s=hardware.step.request_s,
        kv_token_s=hardware.step.kv_token_s,
    )
    with tempfile.TemporaryDirectory() as folder:
        python = _interpreter(Path(folder))
        path = Path(folder) / "trace.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("Date", "Time", "PromptTokenCount", "CompletionTokenCount"))
            for row in zip(
                trace.arrival_s.tolist(),
                trace.num_prompt_tokens.tolist(),
                trace.num_output_tokens.tolist(),
                strict=True,
            ):
                writer.writerow((_vidur_driver.DATE, *row))
        step_ms = [str(1e3 * s) for s in (line.host_s, line.request_s, line.kv_token_s)]
        said = _run(
            [
                python,
                _vidur_driver.__file__,
                str(path),
                str(NUM_INSTANCES),
                str(num_kv_blocks),
                *step_ms,
            ],
            cwd=folder,
            limit_s=RUN_LIMIT_S,
        )
        theirs = json.loads(said.splitlines()[-1])
    options = SimulationOptions(
        hardware=dataclasses.replace(hardware, step=line),
        num_instances=NUM_INSTANCES,
        num_kv_blocks=num_kv_blocks,
        config=Config.default("round_robin"),
    )
    simulate(trace.head(1), options)
    start = time.process_time()
    result = simulate(trace, options)
    ours_s = time.process_time() - start
    return Beside(
        version=theirs["version"],
        num_requests=theirs["num_requests"],
        vidur_s=theirs["processor_s"],
        vidur_makespan_s=theirs["makespan_s"],
        ours_s=ours_s,
        ours_makespan_s=result.end_s,
    )


def _interpreter(folder: Path) -> str:
    given = os.environ.get("LLUMSCHED_VIDUR_PYTHON")
    if given:
        return given
    print("installing vidur into an environment of its own", file=sys.stderr, flush=True)
    venv.create(folder / "venv", with_pip=True)
    python = str(folder / "venv" / "bin" / "python")
    _run([python, "-m", "pip", "install", "--quiet", "vidur"], cwd=folder, limit_s=INSTALL_LIMIT_S)
    return python


def _run(command: list[str], *, cwd: str | Path, limit_s: float) -> str:
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise VidurMissing(str(error)) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise VidurMissing(lines[-1])
    return done.stdout
