"""One vocabulary: each thing of the protocol has one name, and it is also what is on the wire."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections import Counter
from types import ModuleType
from typing import Any

import msgspec
import pytest

from llumsched.core import actions
from llumsched.core import events as scheduling
from llumsched.core.migration import events, messages
from llumsched.core.migration.destination import events as arriving
from llumsched.core.migration.messages import (
    BlocksCopied,
    BlocksReserved,
    CommitAcknowledged,
    CommitRequest,
    MigrationMessage,
    QueryCommit,
    ReserveBlocks,
)
from llumsched.core.migration.source import events as leaving
from llumsched.migration import messages as peer
from llumsched.migration.messages import decode_peer, encode_peer
from llumsched.wire import control
from llumsched.wire.control import encode

IMPORTS = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "vllm"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import llumsched.engine.transfer.registry, llumsched.engine.transfer.tcp
import llumsched.engine.transfer.shared_memory, llumsched.instance.llumlet
import llumsched.migration.migrator
"""


def defined_in(module: ModuleType) -> list[str]:
    return [
        name
        for name, _ in inspect.getmembers(module, inspect.isclass)
        if _.__module__ == module.__name__
    ]


def test_no_name_means_two_things() -> None:
    modules = (actions, scheduling, control, events, messages, arriving, leaving, peer)
    names = Counter(name for module in modules for name in defined_in(module))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    "message",
    [
        ReserveBlocks(migration_id="m", request_id="r", source="a", state=b"\x00"),
        CommitRequest(migration_id="m", num_blocks=3, final=b"\x01"),
        QueryCommit(migration_id="m"),
        BlocksReserved(migration_id="m", num_cached_blocks=0),
        CommitAcknowledged(migration_id="m", held_back_s=0.25),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_arrives_as_it_was_sent(message: MigrationMessage) -> None:
    assert decode_peer(encode_peer(message)) == message


def said(kind: str, **fields: Any) -> bytes:
    return encode(peer.Envelope(kind=kind, body=msgspec.Raw(msgspec.msgpack.encode(fields))))


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (said("QueryCommit", migration_id=3), "Expected `str`, got `int`"),
        (said("QueryCommit"), "missing required field"),
        (said("CommitRequest", migration_id="m", num_blocks=-1), "num_blocks is -1"),
        (said("CommitRequest", migration_id="m", num_blocks=1 << 31), "num_blocks is"),
        (said("QueryCommit", migration_id="m" * 2000), "migration_id has 2000 characters"),
        (said("Shutdown", migration_id="m"), "no message of the protocol is 'Shutdown'"),
        (encode(BlocksCopied(migration_id="m", stage=1, num_blocks_total=1)), "type"),
        (b"\xc1", "malformed"),
    ],
)
def test_what_is_no_message_is_refused(frame: bytes, error: str) -> None:
    with pytest.raises(msgspec.DecodeError, match=error):
        decode_peer(frame)


def test_migrator_and_transports_are_imported_without_torch_and_vllm() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
