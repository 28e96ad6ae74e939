"""Prefix blocks of an engine: named, held, idle, reused."""

from __future__ import annotations

from llumsched.simulator.engines.kv_cache import PrefixCache
from llumsched.simulator.simulation import simulate
from llumsched.simulator.traces.trace import make_trace
from tests.simulator.clusters import make_hardware, make_options


def test_what_was_stored_is_found_until_its_room_is_needed() -> None:
    cache = PrefixCache()
    assert cache.store([1, 2, 3]) == [1, 2, 3]
    assert cache.match([1, 2, 9], 10) == (2, 0)
    assert cache.release([1, 2, 3]) == 3
    assert cache.match([1, 2, 3], 10) == (3, 3)
    # The last block of a prompt goes first.
    cache.shrink(2)
    assert cache.match([1, 2, 3], 10) == (2, 2)
    assert cache.num_idle == 2
    assert cache.num_in_use == 0


def test_a_block_in_use_twice_is_freed_by_the_second() -> None:
    cache = PrefixCache()
    cache.store([1])
    cache.hold([1])
    assert cache.release([1]) == 0
    assert cache.release([1]) == 1


def test_a_name_that_is_taken_is_not_given_again() -> None:
    cache = PrefixCache()
    cache.store([1])
    assert cache.store([1, 2]) == [2]


def test_changes_are_told_once_and_what_came_and_went_is_gone() -> None:
    cache = PrefixCache()
    cache.store([1, 2])
    assert cache.changes() == ((1, 2), ())
    cache.release([1, 2])
    cache.shrink(1)
    cache.store([3])
    cache.release([3])
    cache.shrink(0)
    assert cache.changes() == ((), (2, 1, 3))
    assert cache.changes() == ((), ())


def test_a_shared_prefix_is_computed_once() -> None:
    prefix = list(range(20))
    trace = make_trace(
        "shared",
        arrival_s=[0.0, 10.0],
        num_prompt_tokens=[81, 81],
        num_output_tokens=[2, 2],
        prefix_hashes=[prefix, prefix],
        hash_block_size=4,
    )
    options = make_options(max_num_batched_tokens=64, max_num_seqs=8)
    found = simulate(trace, options)
    # 81 tokens take two chunks; with 80 of them found, one.
    assert found.num_steps == 2 + 1 + 1 + 1
    ignored = simulate(
        trace, make_options(max_num_batched_tokens=64, max_num_seqs=8, enable_prefix_caching=False)
    )
    assert ignored.num_steps == 2 + 1 + 2 + 1


def test_what_an_evicted_request_had_produced_is_not_counted_as_cached() -> None:
    trace = make_trace(
        "evicted",
        arrival_s=[0.0, 0.0],
        num_prompt_tokens=[4, 4],
        num_output_tokens=[100, 100],
        prefix_hashes=[[1], [2]],
        hash_block_size=4,
    )
    engine = {
        "hardware": make_hardware(num_blocks=40),
        "max_num_seqs": 8,
        "max_num_batched_tokens": 8,
    }
    found = simulate(trace, make_options(**engine))
    computed = simulate(trace, make_options(**engine, enable_prefix_caching=False))
    assert found.num_preemptions.tolist() == [0, 1]
    # The prompt's block is found again; everything after it takes its chunks as without a cache.
    assert computed.num_steps - found.num_steps <= 1
    assert found.preemption_loss_s[1] > 10 * 0.036


def test_hashes_of_other_sizes_are_brought_to_the_size_of_a_block() -> None:
    for hash_block_size, num_hashes in ((2, 40), (8, 10)):
        trace = make_trace(
            "other",
            arrival_s=[0.0, 10.0],
            num_prompt_tokens=[81, 81],
            num_output_tokens=[2, 2],
            prefix_hashes=[list(range(num_hashes))] * 2,
            hash_block_size=hash_block_size,
        )
        options = make_options(max_num_batched_tokens=64, max_num_seqs=8)
        assert simulate(trace, options).num_steps == 2 + 1 + 1 + 1
