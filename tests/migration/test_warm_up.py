"""An engine is warmed up with what its sampler compiles for, and keeps nothing of it."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.sample import sampler

from llumsched.engine.vllm.warm_up import warm_up
from tests.migration.pool import Pool


def test_the_first_logprobs_of_a_client_find_the_sampler_compiled(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of tokens are compiled once for a single one and once for any number."""
    compiled = sampler.batched_count_greater_than
    sizes: list[int] = []

    def rank(logprobs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        sizes.append(len(logprobs))
        found: torch.Tensor = compiled(logprobs, values)
        return found

    monkeypatch.setattr(sampler, "batched_count_greater_than", rank)
    instance = pool.instances[0]
    num_free_blocks = instance.num_free_blocks
    warm_up(instance.core)
    assert {size > 1 for size in sizes} == {False, True}
    assert not instance.core.scheduler.requests
    assert instance.num_free_blocks == num_free_blocks
    assert instance.core.output_queue.empty(), "a frontend would not know what it is"
