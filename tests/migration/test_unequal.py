"""Instances of one model with more blocks at one than at the other: requests move both ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm.distributed import parallel_state

from tests.migration.answers import seen_by_client
from tests.migration.cases import CASES, params
from tests.migration.pool import NUM_BLOCKS, Pool
from tests.migration.ways import answers_of, ask, in_a_circle

FEW = 41
NAMES = ("penalties, seed", "JSON schema", "long prompt", "long answer")


@pytest.fixture(scope="module")
def engines(tiny_model: str) -> Iterator[Pool]:
    parallel_state.destroy_model_parallel()
    with Pool(tiny_model, of_each=({}, {"num_gpu_blocks_override": FEW})) as pool:
        free = [instance.num_free_blocks for instance in pool.instances]
        assert free == [NUM_BLOCKS - 1, FEW - 1]
        yield pool


@pytest.fixture(scope="module")
def unmoved(engines: Pool) -> dict[str, Any]:
    return answers_of(engines, {name: CASES[name] for name in NAMES})


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(pool: Pool, unmoved: dict[str, Any], name: str) -> None:
    assert seen_by_client(in_a_circle(pool, name, CASES[name])) == unmoved[name]


def test_the_smaller_one_is_full(pool: Pool, unmoved: dict[str, Any]) -> None:
    name = "long prompt"
    prompt = [600 + i * 31 % 997 for i in range(900)]
    pool.submit("there", prompt, params(max_tokens=100), at=1)
    pool.until(lambda: pool.num_tokens("there") >= 1)
    (sequence_id,) = ask(pool, name, CASES[name])
    pool.until(lambda: pool.num_tokens(name) >= 3)
    report = pool.move(sequence_id, 1)
    assert report.outcome == "refused"
    assert "free blocks" in report.reason
    (answer,) = pool.finish(name)
    assert seen_by_client(answer) == unmoved[name]
    pool.abort("there")
