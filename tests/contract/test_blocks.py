"""A simulated instance and a real vLLM engine count the same blocks, step by step.

One body for both: requests of the same tokens, and the numbers that both must show. Blocks are of
32 tokens, and an instance has 16 of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.simulated import SimulatedInstances
from tests.contract.subjects import BLOCK_SIZE, MOST_RESERVED_AHEAD, NUM_BLOCKS, TwoInstances


@pytest.fixture(scope="module", params=["simulated", "vllm"])
def instances(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TwoInstances]:
    if request.param == "simulated":
        yield SimulatedInstances()
        return
    pytest.importorskip("vllm", reason="the real engine is in the extras cpu and gpu")
    from tests.contract.real import RealInstances
    from tests.models import random_weights

    with RealInstances.boot(random_weights(tmp_path_factory.mktemp("tiny"))) as pool:
        yield RealInstances(pool)


@pytest.fixture
def both(instances: TwoInstances) -> Iterator[TwoInstances]:
    assert used(instances) == (0, 0)
    yield instances
    assert used(instances) == (0, 0)


def used(instances: TwoInstances) -> tuple[int, int]:
    return instances.num_used_blocks(0), instances.num_used_blocks(1)


def prompt(seed: int, num_tokens: int) -> list[int]:
    """Tokens that no prompt of another seed has in the same place."""
    return [504 + (seed + i * 37) % 997 for i in range(num_tokens)]


def run_to(instances: TwoInstances, request_id: str, num_tokens: int) -> None:
    instances.until(lambda: instances.num_tokens(request_id) >= num_tokens)


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"), [(1, 1), (BLOCK_SIZE, 1), (BLOCK_SIZE + 1, 2), (70, 3)]
)
def test_admission_takes_the_blocks_of_the_prompt(
    both: TwoInstances, num_tokens: int, num_blocks: int
) -> None:
    name = f"admission-{num_tokens}"
    both.submit(name, prompt(num_tokens, num_tokens), 2)
    run_to(both, name, 1)
    assert used(both) == (num_blocks, 0)
    run_to(both, name, 2)


def test_a_block_is_taken_by_the_step_that_needs_it(both: TwoInstances) -> None:
    # The n-th token of output is computed by the step after it: 62 + n - 1 tokens are in the cache.
    both.submit("growth", prompt(100, 62), 37)
    seen = []
    for num_tokens in (1, 3, 4, 35, 36):
        run_to(both, "growth", num_tokens)
        seen.append(both.num_used_blocks(0))
    assert seen == [2, 2, 3, 3, 4]
    run_to(both, "growth", 37)


def test_the_last_one_is_preempted_and_computed_again(both: TwoInstances) -> None:
    half = NUM_BLOCKS // 2
    for seed, name in enumerate(("first", "last")):
        both.submit(name, prompt(200 + seed, half * BLOCK_SIZE), 4)
    run_to(both, "last", 1)
    assert used(both) == (2 * half, 0)
    # Each needs one block more, and none is free.
    run_to(both, "first", 2)
    assert both.num_preemptions("first") == 0
    assert both.num_preemptions("last") == 1
    assert used(both) == (half + 1, 0)
    run_to(both, "first", 4)
    # Prompt and first token are computed again, and it goes on where it was.
    run_to(both, "last", 2)
    assert used(both) == (half + 1, 0)
    run_to(both, "last", 4)


def test_a_prefix_that_is_there_takes_no_blocks(both: TwoInstances) -> None:
    shared = prompt(300, 3 * BLOCK_SIZE)
    both.submit("owner", [*shared, *prompt(301, BLOCK_SIZE)], 12)
    run_to(both, "owner", 1)
    assert used(both) == (4, 0)
    both.submit("sharer", [*shared, *prompt(302, BLOCK_SIZE)], 20)
    run_to(both, "sharer", 1)
    # The owner has grown by one; of the sharer's four blocks, three are the owner's.
    assert used(both) == (5 + 1, 0)
    run_to(both, "owner", 12)
    run_to(both, "sharer", 15)
    # They are the sharer's now, and it has grown by one.
    assert used(both) == (5, 0)
    run_to(both, "sharer", 20)


def test_migration_leaves_nothing_here_and_takes_there_what_is_needed(both: TwoInstances) -> None:
    both.submit("mover", prompt(400, 70), 100)
    run_to(both, "mover", 5)
    assert used(both) == (3, 0)
    both.move("mover")
    run_to(both, "mover", both.num_tokens("mover") + 2)
    here, there = used(both)
    needed = -(-(70 + both.num_tokens("mover") - 1) // BLOCK_SIZE)
    assert here == 0
    # A real destination reserves ahead of what the request may grow by while it is copied, and the
    # request grows into that; the simulated one gives it back.
    assert needed <= there <= needed + MOST_RESERVED_AHEAD
    run_to(both, "mover", 92)
    assert used(both) == (0, 6)
    run_to(both, "mover", 100)
