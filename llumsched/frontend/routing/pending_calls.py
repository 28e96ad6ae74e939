"""Calls that instances have not answered yet.

vLLM's client waits for an answer for ever, since to it the end of an engine is the end of all. Here
an instance may die, and then the calls to it fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class PendingCalls:
    """Invariant: a call to an instance that died is over."""

    def __init__(self) -> None:
        self._pending: dict[int, set[asyncio.Future[Any]]] = {}

    async def answer(self, instance: int, call: Coroutine[Any, Any, Any]) -> Any:
        """Result of the call, or its exception.

        Raises:
            ConnectionError: if the instance dies before it answers.
        """
        pending = asyncio.ensure_future(call)
        calls = self._pending.setdefault(instance, set())
        calls.add(pending)
        try:
            # Not awaited itself: its own cancellation could not be told from the caller's.
            await asyncio.wait({pending})
        finally:
            pending.cancel()
            calls.discard(pending)
        if pending.cancelled():
            raise ConnectionError(f"instance {instance} died before it answered")
        return pending.result()

    def died(self, instance: int) -> None:
        """Nothing will answer for this instance any more."""
        for call in self._pending.pop(instance, set()):
            call.cancel()
