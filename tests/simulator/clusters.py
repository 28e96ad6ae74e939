"""Small hardware, small clusters, and random ones: shared by the tests of the simulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from llumsched.config import Config
from llumsched.simulator.hardware.spec import (
    CopyCoefficients,
    Hardware,
    KvCapacity,
    MachineSharing,
    MeasuredRange,
    StepCoefficients,
)
from llumsched.simulator.options import EngineName, SimulationOptions
from llumsched.simulator.results.result import SimulationResult
from llumsched.simulator.traces.trace import Trace, make_trace

REQUEST_COLUMNS = (
    "dispatched_s",
    "scheduled_s",
    "first_token_s",
    "finished_s",
    "num_output_tokens",
    "itl_max_s",
    "num_cached_tokens",
    "num_preemptions",
    "preemption_loss_s",
    "num_migrations",
    "migration_downtime_s",
    "instance",
    "status",
)


_MACHINES = (
    MachineSharing(),
    MachineSharing(num_instances=2, decodes_by_decodes=0.25),
    MachineSharing(
        num_instances=3,
        decodes_by_decodes=0.5,
        decodes_by_prompts=0.1,
        prompts_by_decodes=0.2,
        prompts_by_prompts=0.05,
    ),
)


def make_hardware(
    *,
    num_blocks: int = 200,
    block_size: int = 4,
    skew_token_s: float = 0.0,
    machine: MachineSharing = MachineSharing(),  # noqa: B008 - it is frozen
) -> Hardware:
    """LLaMA-7B on an A10, about, with little memory."""
    return Hardware(
        name="test",
        model="LLaMA-7B",
        accelerator="an A10, about",
        source="made up for tests",
        fit_error=0.0,
        boot_s=2.0,
        machine=machine,
        kv=KvCapacity(num_blocks=num_blocks, block_size=block_size, bytes_per_token=524288),
        step=StepCoefficients(
            host_s=5.6e-3,
            floor_s=30.44e-3,
            token_s=0.203e-3,
            request_s=0.27e-3,
            kv_token_s=0.874e-6,
            skew_token_s=skew_token_s,
            prefill_pair_s=10.2e-9,
            copy_slowdown=0.02,
        ),
        copy=CopyCoefficients(base_s=15e-3, token_s=0.211e-3),
        measured=MeasuredRange(batch_tokens=100_000, requests=1000, kv_tokens=1_000_000),
    )


def make_options(**changes: Any) -> SimulationOptions:
    """One instance and no policy to speak of, but for what is given."""
    given = {
        "hardware": make_hardware(),
        "num_instances": 1,
        "config": Config.default("round_robin"),
        **changes,
    }
    return SimulationOptions(**given)


def make_requests(*rows: tuple[float, int, int]) -> Trace:
    """A trace of (arrival in seconds, prompt tokens, output tokens)."""
    arrivals, prompts, outputs = zip(*rows, strict=True)
    return make_trace(
        "test", arrival_s=arrivals, num_prompt_tokens=prompts, num_output_tokens=outputs
    )


@st.composite
def traces(draw: st.DrawFn, *, block_size: int, with_hashes: bool | None = None) -> Trace:
    """A few dozen requests, some at the same instant, some with prefixes in common."""
    num_requests = draw(st.integers(1, 40))
    longest_prompt = draw(st.sampled_from((5, 40, 150)))
    longest_output = draw(st.sampled_from((3, 25, 90)))
    rate_rps = draw(st.sampled_from((0.5, 4.0, 30.0, 1000.0)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    arrivals = np.cumsum(rng.exponential(1 / rate_rps, num_requests))
    if draw(st.booleans()):
        arrivals = np.round(arrivals)
    prompts = rng.integers(1, longest_prompt + 1, num_requests)
    hashes = None
    if draw(st.booleans()) if with_hashes is None else with_hashes:
        hashes = []
        for row, num_tokens in enumerate(prompts.tolist()):
            num_blocks = num_tokens // block_size
            num_shared = int(rng.integers(0, num_blocks + 1))
            group = int(rng.integers(3)) * 1000
            shared = [group + block for block in range(num_shared)]
            own = [(row + 10) * 1000 + block for block in range(num_blocks - num_shared)]
            hashes.append(shared + own)
    return make_trace(
        "random",
        arrival_s=arrivals,
        num_prompt_tokens=prompts,
        num_output_tokens=rng.integers(1, longest_output + 1, num_requests),
        execution_priority=rng.integers(0, 2, num_requests),
        prefix_hashes=hashes,
        hash_block_size=block_size,
    )


@st.composite
def engine_options(draw: st.DrawFn, *, block_size: int) -> dict[str, Any]:
    """An engine that is often short of something."""
    engine: EngineName = draw(st.sampled_from(("vllm-v1", "vllm-0.1")))
    budgets = (64, 256) if engine == "vllm-v1" else (4000,)
    return {
        "engine": engine,
        "hardware": make_hardware(
            num_blocks=draw(st.sampled_from((70, 120, 300))),
            block_size=block_size,
            skew_token_s=draw(st.sampled_from((0.0, 1e-7))),
            machine=draw(st.sampled_from(_MACHINES)),
        ),
        "max_num_seqs": draw(st.sampled_from((2, 8, 64))),
        "max_num_batched_tokens": draw(st.sampled_from(budgets)),
        "watermark": draw(st.sampled_from((None, 0.05))),
    }


@st.composite
def clusters(draw: st.DrawFn) -> tuple[Trace, SimulationOptions]:
    """A trace and a cluster that migrates much, and sometimes scales, or loses an instance."""
    block_size = draw(st.sampled_from((4, 16)))
    scheduler: dict[str, Any] = {
        "migration_interval_s": draw(st.sampled_from((0.05, 0.5))),
        "migration_settle_s": draw(st.sampled_from((0.0, 5.0))),
    }
    policy = draw(
        st.sampled_from(
            ("round_robin", "adaptive", "latency", "throughput", "prefix_aware", "disaggregated")
        )
    )
    config = Config(policy=policy, scheduler=scheduler)
    if policy == "latency":
        config = replace(config, params={"source_below": 100.0, "destination_above": 100.0})
        if draw(st.booleans()):
            scaling = {
                "max_instances": 5,
                "scale_up_after_s": 1.0,
                "scale_down_after_s": 2.0,
                "scale_up_cooldown_s": 1.0,
                "scale_down_cooldown_s": 1.0,
            }
            config = replace(config, scheduler={**scheduler, **scaling})
    failures: tuple[tuple[int, float], ...] = ()
    if draw(st.booleans()):
        failures = ((0, draw(st.floats(0.01, 5.0))),)
    options = SimulationOptions(
        **draw(engine_options(block_size=block_size)),
        num_instances=draw(st.integers(1, 4)),
        config=config,
        failures=failures,
        report_delay_s=draw(st.sampled_from((0.0, 0.001, 0.3))),
        record_timeline=True,
        until_s=2000.0,
    )
    return draw(traces(block_size=block_size)), options


def assert_same(one: SimulationResult, other: SimulationResult) -> None:
    """Two simulations of one trace had the same history, to the picosecond."""
    for name in REQUEST_COLUMNS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    gaps, other_gaps = (np.sort(np.repeat(*r.token_gaps.weighted())) for r in (one, other))
    np.testing.assert_allclose(gaps, other_gaps, rtol=1e-9)
    if one.timeline is not None:
        for name in type(one.timeline).__dataclass_fields__:
            np.testing.assert_array_equal(
                getattr(one.timeline, name), getattr(other.timeline, name), err_msg=name
            )
    # NaN differs from itself; its text does not.
    assert repr(one.migrations) == repr(other.migrations)
    assert repr(one.instances) == repr(other.instances)
    for name in ("policy", "makespan_s", "end_s", "num_steps", "counters", "warnings"):
        assert getattr(one, name) == getattr(other, name), name
