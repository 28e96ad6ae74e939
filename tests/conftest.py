"""Settings of every test."""

import gc
import os
from collections.abc import Iterator

import pytest
import zmq
from hypothesis import settings

# How long an example takes says more about what else the machine is doing.
# The examples of every run are the same, so that a change is judged by what it changed; whoever
# looks for new ones asks for them: see `tests.campaigns`.
settings.register_profile(
    "llumsched", deadline=None, derandomize="LLUMSCHED_EXAMPLES" not in os.environ
)
settings.load_profile("llumsched")

# Otherwise the first request with logprobs waits for a compiler, in every engine.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@pytest.fixture(autouse=True, scope="module")
def no_context_is_left_to_the_collector() -> Iterator[None]:
    """One that is garbage with its sockets blocks whichever test the collector runs in, for ever:
    ``Context.__del__`` finds its sockets by weak references, which are gone by then."""
    before = {id(context) for context in _open_contexts()}
    yield
    left = [context for context in _open_contexts() if id(context) not in before]
    for context in left:
        context.destroy(linger=0)
    assert not left, "close each ZMQ context, and what it belongs to"


def _open_contexts() -> list[zmq.Context[zmq.Socket[bytes]]]:
    return [
        thing
        for thing in gc.get_objects()
        if type(thing).__module__.startswith("zmq")
        and isinstance(thing, zmq.Context)
        and not thing.closed
    ]
