"""Values that many tests need one of, with only what a test is about to be named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llumsched.wire.control import MigrationStatistics, ReportMigration

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from vllm.v1.engine import EngineCoreRequest

STATISTICS = MigrationStatistics(
    num_stages=3,
    num_blocks=45,
    num_cached_blocks=2,
    num_bytes=1_500_000,
    num_tokens=700,
    num_output_tokens=20,
    total_s=0.31,
    suspended_s=0.021,
    step_time_s=0.02,
    transport="shared_memory",
)


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """Samples of a registry by name, summed over labels."""
    found: dict[str, float] = {}
    for family in registry.collect():
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def engine_request(request_id: str = "r1", **changes: Any) -> EngineCoreRequest:
    """A short request as vLLM's frontend sends it to an engine core."""
    # Tests of the scheduler import this module, and vLLM takes seconds.
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    values: dict[str, Any] = {
        "prompt_token_ids": [1, 2, 3],
        "mm_features": None,
        "sampling_params": SamplingParams(max_tokens=5),
        "pooling_params": None,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(request_id=request_id, **values | changes)


def migration_report(migration_id: str = "m", **changes: Any) -> ReportMigration:
    """How a migration ended: it moved ``r1`` from ``a`` to ``b``, unless told otherwise."""
    values: dict[str, Any] = {
        "request_id": "r1",
        "source": "a",
        "destination": "b",
        "outcome": "committed",
        "reason": "",
    }
    return ReportMigration(migration_id=migration_id, **values | changes)
