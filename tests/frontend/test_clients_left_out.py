"""Each call that forgets a request matters: with it left out, the property test finds what is kept.

A line of a method is replaced, and worlds of ``test_clients`` are played until one of them notices.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from llumsched.core.scheduling.dispatcher import Dispatcher
from llumsched.core.scheduling.request_ledger import Ledger
from llumsched.frontend.routing.client import RoutingEngineClient
from llumsched.frontend.routing.engine import Engine
from llumsched.frontend.routing.routes import Routes
from tests.frontend.test_clients import ACTS, play

MOST_WORLDS = 150
NUM_ACTS = 60
# A client that waits for ever is noticed as well.
PATIENCE_S = 30.0


@dataclass(frozen=True)
class LeftOut:
    """``line`` is the beginning of the statement of ``method`` that ``instead`` replaces."""

    owner: type
    method: str
    line: str
    instead: str = "pass"

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.method}: {self.line}"


LEFT_OUT = (
    LeftOut(RoutingEngineClient, "add_request_async", 'self._drop(request_id, "rejected"'),
    LeftOut(
        RoutingEngineClient,
        "add_request_async",
        "return  # aborted as the scheduler answered",
    ),
    LeftOut(RoutingEngineClient, "abort_requests_async", "await self._abort_at(instance, ids)"),
    LeftOut(
        RoutingEngineClient,
        "_end",
        "route = self.routes.close(request_id)",
        "route = self.routes.get(request_id)",
    ),
    LeftOut(RoutingEngineClient, "_end", "self._resumer.forget(request_id)"),
    LeftOut(RoutingEngineClient, "_end", "self._placer.ended(request_id, aborted=True)"),
    LeftOut(RoutingEngineClient, "_drop", "self.abort_soon(instance, request_id)"),
    LeftOut(RoutingEngineClient, "_take_in_hand_over", "self.abort_soon(instance, request_id)"),
    LeftOut(RoutingEngineClient, "_deliver", "self._resumer.forget(request.request_id)"),
    LeftOut(RoutingEngineClient, "_deliver", "self._placer.ended("),
    LeftOut(RoutingEngineClient, "_goes_elsewhere", "self._placer.sent_elsewhere("),
    LeftOut(Engine, "_add_request", "self.output_processor.abort_requests("),
    LeftOut(Routes, "_count", "del self._routes[output.request_id]"),
    LeftOut(Ledger, "close", "del self.requests[record.request.request_id]"),
    LeftOut(Ledger, "close", "self.unplace(record)"),
    LeftOut(Ledger, "unplace", "self._drop_overlay(record)"),
    LeftOut(Ledger, "unplace", "del on_instance[record.request.request_id]"),
    LeftOut(Dispatcher, "end", "self._queue.remove(record)"),
    LeftOut(Dispatcher, "_reject", "self._queue.remove(record)"),
    LeftOut(Dispatcher, "sent_elsewhere", "self._ledger.unplace(record)"),
)


def leave_out(monkeypatch: pytest.MonkeyPatch, what: LeftOut) -> None:
    method = getattr(what.owner, what.method)
    lines = textwrap.dedent(inspect.getsource(method)).splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.strip().startswith(what.line))
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    # A statement of several lines ends with a bracket where it began.
    end = at + 1
    if lines[at].endswith(("(", ",")):
        end = next(i for i in range(at + 1, len(lines)) if lines[i] == f"{indent})") + 1
    lines[at:end] = [indent + what.instead]
    source = "\n".join(lines).replace("super()", f"super({what.owner.__name__}, self)")
    namespace: dict[str, Any] = {}
    names = vars(sys.modules[what.owner.__module__])
    exec("from __future__ import annotations\n" + source, names | {}, namespace)
    monkeypatch.setattr(what.owner, what.method, namespace[what.method])


async def _play(acts: Sequence[tuple[str, int]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await play(acts)


def is_noticed() -> bool:
    """True if one of many worlds fails; the acts of each are drawn anew, and always the same."""
    for seed in range(MOST_WORLDS):
        draw = random.Random(seed)
        acts = [(draw.choice(ACTS), draw.randrange(12)) for _ in range(NUM_ACTS)]
        try:
            asyncio.run(_play(acts))
        except (AssertionError, LookupError, RuntimeError, TimeoutError):
            return True
    return False


@pytest.mark.parametrize("what", LEFT_OUT, ids=str)
def test_what_is_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch, what: LeftOut) -> None:
    leave_out(monkeypatch, what)
    assert is_noticed()


def test_nothing_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with as many worlds, and a line replaced by itself, nothing is found."""
    line = "self._resumer.forget(request_id)"
    leave_out(monkeypatch, LeftOut(RoutingEngineClient, "_end", line, line))
    monkeypatch.setattr(sys.modules[__name__], "MOST_WORLDS", 40)
    assert not is_noticed()
