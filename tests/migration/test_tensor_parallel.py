"""Two workers an instance: each moves its shard of the KV cache to the same rank.

The engines are of the tiny model, whose heads two workers can share.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import pytest
import vllm.envs as envs
from vllm.lora.request import LoRARequest

from llumsched.core.transfer_options import TransferOptions
from llumsched.engine.transfer.shards import CopyShard, ShardedKV
from tests.campaigns import THOROUGH
from tests.migration import adapters
from tests.migration.answers import seen_by_client
from tests.migration.cases import CASES, Case
from tests.migration.leaving_out import moved
from tests.migration.pool import PATIENCE_S, Pool, events_that_are_over
from tests.migration.ways import answers_of, ask, in_a_circle

# Four more processes of engines to boot: the shards themselves are in tests/engine/test_kv_shards.
pytestmark = pytest.mark.skipif(not THOROUGH, reason="boots two engines of two workers each")

NUM_WORKERS = 2
# Of each kind that a worker keeps something for.
CHOSEN = ("greedy", "penalties, seed", "logprobs", "JSON schema", "three of one", "long prompt")
CHOSEN_CASES: dict[str, Case] = {name: CASES[name] for name in CHOSEN}


@contextmanager
def instances(model: str, *, is_async: bool = False, **flags: Any) -> Iterator[Pool]:
    with pytest.MonkeyPatch.context() as patched, ExitStack() as stack:
        # Each worker computes with one thread, on whichever core is free. Once there has been an
        # engine in this process, vLLM does not look at the environment again.
        patched.setitem(vars(envs), "VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patched.setitem(os.environ, "OMP_NUM_THREADS", "1")
        if is_async:
            # The workers are forked, so it is so in them as well.
            stack.enter_context(events_that_are_over())
        yield stack.enter_context(
            Pool(model, tensor_parallel_size=NUM_WORKERS, async_scheduling=is_async, **flags)
        )


@pytest.fixture(scope="module")
def engines(tiny_model: str) -> Iterator[Pool]:
    with instances(tiny_model) as pool:
        yield pool


@pytest.fixture(scope="module")
def unmoved(engines: Pool) -> dict[str, Any]:
    return answers_of(engines, CHOSEN_CASES)


def kv_of(pool: Pool, index: int) -> ShardedKV:
    kv = pool.instances[index].port.kv
    assert isinstance(kv, ShardedKV)
    return kv


@pytest.mark.parametrize("name", CHOSEN)
def test_in_a_circle(pool: Pool, unmoved: dict[str, Any], name: str) -> None:
    assert seen_by_client(in_a_circle(pool, name, CASES[name])) == unmoved[name]


def test_bytes_that_come_through_a_socket(pool: Pool, unmoved: dict[str, Any]) -> None:
    pool.configure(transfer=TransferOptions(transport="tcp", checksum=True, staging_slot_mb=0.5))
    assert moved(pool, "long prompt", CASES["long prompt"]) == unmoved["long prompt"]
    pool.configure()


@pytest.mark.parametrize("rank", range(NUM_WORKERS))
def test_the_shard_of_one_rank_left_out(
    pool: Pool, unmoved: dict[str, Any], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    kv = kv_of(pool, 1)
    exchange = kv._exchange

    def without_one(commands: list[CopyShard]) -> float:
        commands[rank] = msgspec.structs.replace(commands[rank], block_ids=[])
        return exchange(commands)

    monkeypatch.setattr(kv, "_exchange", without_one)
    assert moved(pool, "long prompt", CASES["long prompt"]) != unmoved["long prompt"]


def test_a_worker_that_cannot_copy_ends_the_migration(
    pool: Pool, unmoved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request goes on where it is, and the destination holds nothing for it."""
    kv = kv_of(pool, 1)
    exchange = kv._exchange

    def of_no_such_slot(commands: list[CopyShard]) -> float:
        commands[1] = msgspec.structs.replace(commands[1], slot=1000)
        return exchange(commands)

    monkeypatch.setattr(kv, "_exchange", of_no_such_slot)
    reason = moved(pool, "long prompt", CASES["long prompt"])
    assert "the worker of rank 1 cannot copy its blocks: IndexError" in reason
    pool.settle()
    monkeypatch.undo()
    assert moved(pool, "long prompt", CASES["long prompt"]) == unmoved["long prompt"]


def test_blocks_are_not_free_while_a_worker_writes_them(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client leaves meanwhile: what was reserved is given back when the worker is through."""
    kv, destination = kv_of(pool, 1), pool.instances[1]
    exchange, go_on = kv._exchange, threading.Event()

    def wait(commands: list[CopyShard]) -> float:
        assert go_on.wait(PATIENCE_S)
        return exchange(commands)

    monkeypatch.setattr(kv, "_exchange", wait)
    (sequence_id,) = ask(pool, "r", CASES["long answer"])
    pool.until(lambda: pool.num_tokens("r") >= 3)
    moving = pool.start_move(sequence_id, 1)
    incoming = destination.migrator._incoming
    pool.until(lambda: any(a.num_writing for a in incoming))
    pool.abort("r")
    pool.until(moving.done)
    assert moving.result().outcome == "aborted"
    pool.until(lambda: destination.migrator.num_incoming == 0)
    assert destination.port._imports
    go_on.set()
    pool.settle()


# ---- with what is switched on -------------------------------------------------------------------


def all_go_in_a_circle(pool: Pool, cases: Mapping[str, Case]) -> None:
    expected = answers_of(pool, cases)
    for name, case in cases.items():
        pool.forget_everything()
        assert seen_by_client(in_a_circle(pool, name, case)) == expected[name], name
        pool.settle()


@pytest.mark.parametrize("is_async", [False, True], ids=["", "async"])
def test_with_lora(tiny_model: str, adapter: LoRARequest, is_async: bool) -> None:
    cases = adapters.with_adapter(adapters.LORA, adapter)
    with instances(tiny_model, is_async=is_async, **adapters.FLAGS) as pool:
        all_go_in_a_circle(pool, cases)


def test_with_steps_in_flight(tiny_model: str) -> None:
    """There are two steps of both workers in flight."""
    with instances(tiny_model, is_async=True) as pool:
        assert pool.instances[0].core.batch_queue is not None
        all_go_in_a_circle(pool, CHOSEN_CASES)
