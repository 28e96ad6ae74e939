"""Results made by hand, to see what is made of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from llumsched.config import Config
from llumsched.simulator.hardware.spec import (
    CopyCoefficients,
    Hardware,
    KvCapacity,
    MeasuredRange,
    StepCoefficients,
)
from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.results.records import (
    InstanceLifetime,
    MigrationRecord,
    RequestStatus,
    Timeline,
    TokenGaps,
)
from llumsched.simulator.results.result import SimulationResult
from llumsched.simulator.traces.trace import make_trace

NAN = float("nan")


def make_hardware() -> Hardware:
    """A machine that nobody has."""
    return Hardware(
        name="test",
        model="test",
        accelerator="test",
        source="test",
        fit_error=NAN,
        kv=KvCapacity(num_blocks=100),
        step=StepCoefficients(token_s=1e-3, floor_s=1e-2),
        copy=CopyCoefficients(token_s=1e-5),
        measured=MeasuredRange(batch_tokens=2048, requests=256, kv_tokens=1600),
    )


def make_result(**changed: Any) -> SimulationResult:
    """Two instances, four requests: two finished (one of them moved), one rejected, one running."""
    finished, rejected, running = (
        RequestStatus.FINISHED,
        RequestStatus.REJECTED,
        RequestStatus.UNFINISHED,
    )
    columns: dict[str, Any] = {
        "trace": make_trace(
            "four",
            arrival_s=[0.0, 1.0, 2.0, 3.0],
            num_prompt_tokens=[100, 200, 300, 400],
            num_output_tokens=[11, 1, 5, 100],
        ),
        "options": SimulationOptions(
            hardware=make_hardware(), num_instances=2, config=Config.default("latency")
        ),
        "policy": "latency",
        "dispatched_s": np.array([0.0, 1.0, NAN, 3.0]),
        "scheduled_s": np.array([0.5, 1.0, NAN, 3.5]),
        "first_token_s": np.array([1.0, 1.5, NAN, 4.0]),
        "finished_s": np.array([3.0, 1.5, NAN, NAN]),
        "num_output_tokens": np.array([11, 1, 0, 10]),
        "token_gaps": TokenGaps(
            first_s=np.array([0.1, 0.6]),
            growth_s=np.array([0.1, 0.0]),
            num_steps=np.array([2, 1]),
            num_tokens=np.array([1, 2]),
        ),
        "itl_max_s": np.array([0.6, NAN, NAN, 0.2]),
        "num_cached_tokens": np.array([64, 0, 0, 256]),
        "num_preemptions": np.array([1, 0, 0, 2]),
        "preemption_loss_s": np.array([0.4, 0.0, 0.0, 0.9]),
        "num_migrations": np.array([1, 0, 0, 0]),
        "migration_downtime_s": np.array([0.02, 0.0, 0.0, 0.0]),
        "instance": np.array([1, 0, -1, 0]),
        "status": np.array([finished, finished, rejected, running]),
        "instances": (
            InstanceLifetime(instance_id="i0", launched_s=0.0, serving_s=0.0, gone_s=NAN),
            InstanceLifetime(instance_id="i1", launched_s=1.0, serving_s=2.0, gone_s=4.0),
        ),
        "migrations": (make_migration(), make_migration(outcome="aborted", downtime_s=NAN)),
        "timeline": Timeline(
            time_s=np.array([1.0, 1.0, 2.0, 2.0]),
            instance=np.array([0, 1, 0, 1]),
            num_used_blocks=np.array([50, 90, 60, 100]),
            num_reserved_blocks=np.array([10, 0, 0, 0]),
            num_free_blocks=np.array([40, 10, 40, 0]),
            num_running=np.array([1, 1, 1, 1]),
            num_waiting=np.array([0, 0, 0, 3]),
        ),
        "makespan_s": 5.0,
        "end_s": 5.0,
        "num_steps": 20,
        "rejections": {2: "the queue is full"},
        "policy_failures": (),
        "counters": {},
        "is_complete": False,
    }
    return SimulationResult(**(columns | changed))


def make_migration(*, outcome: str = "committed", downtime_s: float = 0.02) -> MigrationRecord:
    return MigrationRecord(
        migration_id=f"m-{outcome}",
        request=0,
        source="i0",
        destination="i1",
        start_s=1.2,
        end_s=2.0,
        num_stages=2,
        num_blocks=7,
        downtime_s=downtime_s,
        outcome=outcome,
    )
