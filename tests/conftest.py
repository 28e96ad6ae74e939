"""Settings of every test."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import settings

from tests import runner_v2
from tests.marks import marks_of
from tests.wheels import ROOT, build_wheel

# How long an example takes says more about what else the machine is doing.
# The examples of every run are the same, so that a change is judged by what it changed; whoever
# looks for new ones asks for them: see `tests.campaigns`.
settings.register_profile(
    "llumsched", deadline=None, derandomize="LLUMSCHED_EXAMPLES" not in os.environ
)
settings.load_profile("llumsched")

if runner_v2.IS_ON:
    runner_v2.switch_on()

# Otherwise the first request with logprobs waits for a compiler, in every engine.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

# `Context.__del__` finds its sockets by weak references. In a cycle of garbage these are gone by
# then, so it would wait for them for ever, in whichever test the collector runs.
_left_contexts: list[str] = []


def _leave(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    if not context._shadow and not context.closed:
        _left_contexts.append(repr(context))


zmq.Context.__del__ = _leave  # type: ignore[method-assign]


@pytest.fixture(autouse=True, scope="module")
def no_context_is_left_to_the_collector() -> Iterator[None]:
    yield
    gc.collect()
    # What is left is not looked at again: with vLLM's modules in memory that takes a second each.
    gc.freeze()
    left, _left_contexts[:] = list(_left_contexts), []
    assert not left, "close each ZMQ context, and what it belongs to"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test by what it starts: `make test-fast` leaves those out."""
    for item in items:
        for mark in marks_of(item.path.relative_to(ROOT).as_posix()):
            item.add_marker(mark)


def pytest_unconfigure() -> None:
    """Let libraries find what is theirs when the interpreter ends."""
    gc.unfreeze()
