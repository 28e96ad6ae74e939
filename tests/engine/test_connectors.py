"""KV connectors of vLLM's scheduler hear of a move what they hear of an end and of a beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)

from llumsched.engine.base import CannotMigrate, Refusal
from llumsched.engine.vllm.migration import connectors
from llumsched.engine.vllm.migration.connectors import MOVABLE, blocks_being_read
from tests.engine.scheduled import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    Engine,
    answer_of,
    engine_config,
    move,
    suspended,
)

PROMPT = list(range(7, 27))
NUM_TOKENS = 40


class Recording(KVConnectorBase_V1):
    """A connector that notes what its scheduler tells it, and keeps blocks of what ends."""

    calls: ClassVar[list[tuple[str, str, Any]]] = []
    delays_frees: ClassVar[bool] = False

    def start_load_kv(self, *_: Any, **__: Any) -> None: ...

    def wait_for_layer_load(self, _: str) -> None: ...

    def save_kv_layer(self, *_: Any, **__: Any) -> None: ...

    def wait_for_save(self) -> None: ...

    def on_new_request(self, request: Any) -> None:
        self.calls.append(("new", request.request_id, None))

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        self.calls.append(("lookup", request.request_id, num_computed_tokens))
        return 0, False

    def update_state_after_alloc(self, request: Any, _: Any, num_external_tokens: int) -> None:
        self.calls.append(("alloc", request.request_id, num_external_tokens))

    def build_connector_meta(self, _: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        self.calls.append(("finished", request.request_id, len(block_ids)))
        return self.delays_frees, None


def engine(folder: Path, connector: str, module: str | None = None, **extra: Any) -> Engine:
    transfer = KVTransferConfig(
        kv_connector=connector,
        kv_role="kv_both",
        kv_connector_module_path=module,
        kv_connector_extra_config=extra,
    )
    return Engine(engine_config(folder, kv_transfer_config=transfer))


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, Engine]:
    """Two engines with a connector that notes what it is told."""
    monkeypatch.setattr(connectors, "MOVABLE", MOVABLE | {"Recording"})
    monkeypatch.setattr(Recording, "delays_frees", False)
    Recording.calls.clear()
    here, there = (engine(tmp_path, "Recording", __name__) for _ in range(2))
    assert here.port.refusal is None
    here.submit("a", PROMPT, NUM_TOKENS)
    here.until("a", 5)
    return here, there


def test_a_move_is_an_end_and_a_beginning(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    Recording.calls.clear()
    move("a", here, there)
    num_computed = there.request("a").num_computed_tokens
    whole = num_computed // BLOCK_SIZE * BLOCK_SIZE
    assert Recording.calls == [
        ("new", "a", None),
        ("lookup", "a", whole),
        ("finished", "a", -(-num_computed // BLOCK_SIZE)),
    ]
    there.until("a", 10)
    # A preemption looks it up again, from its beginning.
    Recording.calls.clear()
    there.reset()
    there.finish()
    assert ("lookup", "a", 0) in Recording.calls
    assert there.answers["a"] == answer_of(PROMPT, NUM_TOKENS)
    here.finish()


def test_a_request_that_is_rolled_back_begins_anew(pair: tuple[Engine, Engine]) -> None:
    here, _ = pair
    Recording.calls.clear()
    with suspended("a", here):
        pass
    assert [call[0] for call in Recording.calls] == ["lookup"]
    here.finish()
    assert here.answers["a"] == answer_of(PROMPT, NUM_TOKENS)


def test_what_has_ended_and_is_held_is_not_there(
    pair: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connector may keep the blocks of a request until they are sent."""
    here, _ = pair
    monkeypatch.setattr(Recording, "delays_frees", True)
    lost: list[tuple[str, str]] = []
    here.port.on_lost = lambda request_id, what: lost.append((request_id, what))
    here.port.start_export("a")
    here.until("a", NUM_TOKENS)
    assert here.request("a").is_finished()
    assert lost == [("a", "finished")]
    here.port.resume("a")
    with pytest.raises(CannotMigrate) as refused:
        here.port.start_export("a")
    assert refused.value.refusal is Refusal.NOT_HERE


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"do_remote_decode": True}, "another engine fetches"),
        ({"do_remote_prefill": True}, "has not been fetched"),
        ({"do_remote_prefill": False}, None),
        ({}, None),
    ],
)
def test_a_request_of_a_transfer(
    pair: tuple[Engine, Engine], params: dict[str, Any], reason: str | None
) -> None:
    here, _ = pair
    here.request("a").kv_transfer_params = params
    assert [c.request_id for c in here.port.candidates()] == ([] if reason else ["a"])
    if reason is None:
        here.port.start_export("a")
        return
    with pytest.raises(CannotMigrate, match=reason) as refused:
        here.port.start_export("a")
    assert refused.value.refusal is Refusal.KV_CONNECTOR


def test_a_connector_that_is_not_known(tmp_path: Path) -> None:
    """The instance keeps what has KV; what waits is new to every instance."""
    here, there = (engine(tmp_path, "Recording", __name__) for _ in range(2))
    for name in ("a", "b", "c"):
        here.submit(name, PROMPT, NUM_TOKENS)
    here.until("b", 2)
    with pytest.raises(CannotMigrate, match="did not see begin") as refused:
        here.port.start_export("a")
    assert refused.value.refusal is Refusal.KV_CONNECTOR
    assert here.port.candidates() == []
    assert here.request("c") not in here.scheduler.running
    move("c", here, there)
    for one in (here, there):
        one.finish()
    assert there.answers["c"] == answer_of(PROMPT, NUM_TOKENS)


# ---- offloading ---------------------------------------------------------------------------------


@pytest.fixture
def offloading(tmp_path: Path) -> tuple[Engine, Engine]:
    """Two engines with vLLM's own offloading, whose copies never end."""
    here, there = (
        engine(tmp_path, "OffloadingConnector", cpu_bytes_to_use=1 << 24) for _ in range(2)
    )
    return here, there


def test_offloaded_requests_move_there_and_back(offloading: tuple[Engine, Engine]) -> None:
    here, there = offloading
    here.submit("a", PROMPT, 60)
    here.until("a", 5)
    move("a", here, there)
    there.until("a", 20)
    with suspended("a", there):
        pass
    there.until("a", 30)
    states: Any = there.scheduler.connector.connector_scheduler._req_status
    held = there.scheduler.kv_cache_manager.get_block_ids("a")[0]
    assert states["a"].group_states[0].block_ids == list(held)


def test_blocks_that_are_still_read_take_nobody_in(offloading: tuple[Engine, Engine]) -> None:
    """A finished request is copied at the next step; blocks are written between steps."""
    here, there = offloading
    here.submit("a", PROMPT, 60)
    here.until("a", 5)
    there.submit("b", list(range(200, 200 + 28 * BLOCK_SIZE)), 8)
    there.until("b", 8)
    read = blocks_being_read(there.scheduler)
    assert read
    state = here.port.start_export("a")
    # Those are the only blocks that are free.
    pool = there.scheduler.kv_cache_manager.block_pool
    others = []
    while pool.get_num_free_blocks() > len(read):
        others += pool.get_new_blocks(1)
    with pytest.raises(CannotMigrate, match="still reads") as refused:
        there.port.reserve(state)
    assert refused.value.refusal is Refusal.NO_ROOM
    assert pool.get_num_free_blocks() == NUM_BLOCKS - 1 - len(others)
