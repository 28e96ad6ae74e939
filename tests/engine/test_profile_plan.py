"""The plan of a profile: shapes that fit the engine, all costs early."""

from __future__ import annotations

from llumsched.engine.vllm.profiling.profile import Workload, plan


def test_every_workload_fits_the_engine() -> None:
    workloads = plan(max_num_seqs=8, max_model_len=512, num_kv_tokens=2048)
    assert len(set(workloads)) == len(workloads)
    for workload in workloads:
        assert len(workload.contexts) + len(workload.joining) <= 8
        assert max(workload.contexts + workload.joining) <= 512 - 12
        assert workload.cost + 12 * 8 <= 2048


def test_there_are_single_prompts_batches_unequal_ones_and_prompts_that_join() -> None:
    workloads = plan(max_num_seqs=8, max_model_len=512, num_kv_tokens=4096)
    assert Workload(contexts=(256,)) in workloads
    assert Workload(contexts=(32,) * 8) in workloads
    assert any(len(set(workload.contexts)) > 1 for workload in workloads)
    assert Workload(contexts=(16,) * 3, joining=(256,)) in workloads


def test_the_cheapest_is_first_and_an_early_end_has_seen_every_cost() -> None:
    workloads = plan(max_num_seqs=16, max_model_len=1024, num_kv_tokens=16_384)
    costs = [workload.cost for workload in workloads]
    assert costs[0] == min(costs)
    first = sorted(costs[: len(costs) // 4])
    assert first[-1] >= 0.5 * max(costs)


def test_an_engine_too_small_for_any_batch_gets_one_prompt() -> None:
    assert plan(max_num_seqs=64, max_model_len=64, num_kv_tokens=64) == [Workload(contexts=(16,))]
