"""Generators make what they say: the paper's lengths exactly, the others as their settings ask."""

from __future__ import annotations

import numpy as np
import pytest

from llumsched.simulator.traces.generators import GENERATORS, GeneratorOptions, generate
from llumsched.simulator.traces.trace import TraceError


@pytest.mark.parametrize(
    ("name", "mean", "quantiles"),
    [
        ("S-S", 128, (38, 113, 413, 1464)),
        ("M-M", 254, (32, 173, 1288, 4208)),
        ("L-L", 513, (55, 582, 3113, 5166)),
    ],
)
def test_the_papers_lengths_are_exact(
    name: str, mean: int, quantiles: tuple[int, int, int, int]
) -> None:
    for seed in (0, 1):
        lengths = generate(name, GeneratorOptions(seed=seed)).num_prompt_tokens
        assert len(lengths) == 10_000
        assert round(lengths.mean()) == mean
        assert tuple(np.percentile(lengths, (50, 80, 95, 99)).astype(int)) == quantiles


def test_outputs_follow_inputs_in_one_stream() -> None:
    short_long = generate("S-L", GeneratorOptions())
    assert (
        short_long.num_prompt_tokens.tolist()
        == generate("S-S", GeneratorOptions()).num_prompt_tokens.tolist()
    )
    assert not np.array_equal(
        short_long.num_output_tokens, generate("L-L", GeneratorOptions()).num_prompt_tokens
    )


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(cv: float) -> None:
    trace = generate("S-S", GeneratorOptions(rate_rps=20.0, cv=cv, num_requests=10_000))
    gaps = np.diff(trace.arrival_s)
    assert trace.rate_rps == pytest.approx(20.0, rel=0.15)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_seed_decides_everything(name: str) -> None:
    def make(seed: int) -> list[float]:
        options = GeneratorOptions(rate_rps=5.0, num_requests=300, seed=seed)
        trace = generate(name, options)
        assert len(trace) == 300
        assert trace.name == f"{name}@5"
        return [*trace.arrival_s.tolist(), *trace.num_output_tokens.tolist()]

    assert make(1) == make(1)
    assert make(1) != make(2)


def test_clients_differ_and_the_largest_sends_most() -> None:
    trace = generate("clients", GeneratorOptions(rate_rps=50.0, num_requests=5000, num_clients=20))
    assert trace.client_ids is not None
    counts = {name: trace.client_ids.count(name) for name in set(trace.client_ids)}
    assert len(counts) > 15
    assert max(counts, key=lambda name: counts[name]) == "client-1"
    assert trace.rate_rps == pytest.approx(50.0, rel=0.2)


def test_the_turns_of_a_chat_share_a_growing_prefix() -> None:
    trace = generate("sessions", GeneratorOptions(rate_rps=2.0, num_requests=400))
    assert trace.client_ids is not None
    assert trace.prefix_hashes is not None
    last: dict[str, tuple[int, ...]] = {}
    num_later_turns = 0
    for chat, prompt, hashes in zip(
        trace.client_ids, trace.num_prompt_tokens.tolist(), trace.prefix_hashes, strict=True
    ):
        assert len(hashes) == prompt // trace.hash_block_size
        before = last.get(chat, ())
        assert hashes[: len(before)] == before
        num_later_turns += bool(before)
        last[chat] = hashes
    assert num_later_turns > 100
    # Two chats behind the same system prompt share its blocks, and none of their own.
    own_blocks = [set(hashes[-1:]) for hashes in last.values()]
    assert len(set.union(*own_blocks)) == len(own_blocks)
    assert len({hashes[0] for hashes in last.values()}) == 4


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("S-T", GeneratorOptions(), "unknown generator: 'S-T'"),
        ("S-S", GeneratorOptions(rate_rps=0.0), "rate_rps must be above 0, not 0.0"),
        ("clients", GeneratorOptions(num_clients=0), "num_clients must be at least 1, not 0"),
    ],
)
def test_what_is_wrong_is_named(name: str, options: GeneratorOptions, said: str) -> None:
    with pytest.raises(TraceError, match=said):
        generate(name, options)
