"""Drafters with KV of their own (a draft model, EAGLE): it lies beside the model's, and moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed import parallel_state

from llumsched.engine.transfer.access import LocalKV
from tests import runner_v2
from tests.campaigns import THOROUGH
from tests.migration.answers import seen_by_client
from tests.migration.pool import Pool
from tests.migration.test_speculation import (
    GREEDY,
    NUM_DRAFTS,
    check_distribution,
    preempted_before_and_after,
    temperatures_written,
)
from tests.migration.ways import answers_of, ask, in_a_circle
from tests.models import drafting, eagle_head

pytestmark = pytest.mark.skipif(runner_v2.IS_ON, reason="of model runner V1")

DRAFTERS = {"draft_model": drafting, "eagle": eagle_head}
NAMES = ("repetition penalty", "logprobs", "JSON schema", "long prompt", "repeats itself")


@pytest.fixture(scope="module", params=DRAFTERS)
def engines(
    request: pytest.FixtureRequest, tiny_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pool]:
    folder: Path = tmp_path_factory.mktemp("drafter")
    drafter = {
        "method": request.param,
        "model": DRAFTERS[request.param](tiny_model, folder),
        "num_speculative_tokens": NUM_DRAFTS,
    }
    parallel_state.destroy_model_parallel()
    with temperatures_written(), Pool(tiny_model, speculative_config=drafter) as pool:
        assert pool.instances[0].port.refusal is None
        yield pool


@pytest.fixture(scope="module")
def unmoved(engines: Pool) -> dict[str, Any]:
    return answers_of(engines, {name: GREEDY[name] for name in NAMES})


def num_accepted(pool: Pool, index: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts, from now on, of the drafts that an instance accepts."""
    scheduler: Any = pool.instances[index].core.scheduler
    make = scheduler.make_spec_decoding_stats
    counts: list[int] = []

    def noted(*arguments: Any, num_accepted_tokens: int, **others: Any) -> Any:
        counts.append(num_accepted_tokens)
        return make(*arguments, num_accepted_tokens=num_accepted_tokens, **others)

    monkeypatch.setattr(scheduler, "make_spec_decoding_stats", noted)
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_greedy_in_a_circle(pool: Pool, unmoved: dict[str, Any], name: str) -> None:
    assert seen_by_client(in_a_circle(pool, name, GREEDY[name])) == unmoved[name]


def test_preempted_before_and_after(pool: Pool, unmoved: dict[str, Any]) -> None:
    name = "repeats itself"
    assert seen_by_client(preempted_before_and_after(pool, name)) == unmoved[name]


def test_its_layers_are_in_the_blocks_that_move(pool: Pool) -> None:
    """The drafter's KV is bytes of the same blocks."""
    core, port = pool.instances[0].core, pool.instances[0].port
    (group,) = core.scheduler.kv_cache_config.kv_cache_groups
    config = core.vllm_config
    num_own = config.model_config.get_num_layers(config.parallel_config)
    assert len(group.layer_names) > num_own
    assert isinstance(port.kv, LocalKV)
    page = group.kv_cache_spec.page_size_bytes
    assert port.kv.groups[0].block_num_bytes == len(group.layer_names) * page


def test_it_guesses_on_after_a_move(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = num_accepted(pool, 1, monkeypatch)
    (sequence_id,) = ask(pool, "r", GREEDY["greedy"])
    pool.until(lambda: pool.num_tokens("r") >= 5)
    assert pool.move(sequence_id, 1).outcome == "committed"
    pool.finish("r")
    assert counts
    speculative: Any = pool.instances[1].core.vllm_config.speculative_config
    # The head of EAGLE knows nothing: hardly a guess is right.
    assert any(counts) or speculative.method == "eagle"


@pytest.mark.skipif(not THOROUGH, reason="takes many samples")
def test_sampled_with_the_same_distribution(pool: Pool) -> None:
    check_distribution(pool)
