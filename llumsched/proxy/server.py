"""One plain server as the proxy sees it: whether it is well, what it serves, how full it is.

What has been sent to it is known here at once; what else it does comes from its metrics. A server
that has no metrics is judged by what was sent to it alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from llumsched.core.load import InstanceLoad, InstanceSpec
from llumsched.core.types import PriorityClass, num_blocks_for
from llumsched.logs import FailureLog
from llumsched.proxy.backends import Backend
from llumsched.proxy.breaker import CircuitBreaker
from llumsched.proxy.engine_metrics import ServerLoad, read_load
from llumsched.proxy.prefixes import SentPrefixes
from llumsched.proxy.prompts import BLOCK_SIZE

logger = logging.getLogger(__name__)

DEFAULT_NUM_CACHE_TOKENS = 65_536
"""KV cache of a server of weight 1 that does not tell its own."""
WATCH_INTERVAL_S = 0.5
MODELS_INTERVAL_S = 10.0
PROBE_TIMEOUT_S = 5.0


@dataclass(slots=True, kw_only=True)
class Sent:
    """A request on its way or at the server."""

    num_prompt_tokens: int
    priority: int = PriorityClass.NORMAL
    model: str | None = None
    is_reported: bool = False
    has_begun: bool = False
    num_output_tokens: int = 0


class PlainServer:
    """See the module docstring.

    Args:
        backend: what the operator says of it.
        session: for questions about its health, models and metrics.
        changed: called when it is there, is there no more, or serves other models.
        reported: called with each load report.
        clock: seconds that only ever grow.
    """

    def __init__(
        self,
        backend: Backend,
        session: aiohttp.ClientSession,
        changed: Callable[[PlainServer], None],
        reported: Callable[[PlainServer, InstanceLoad], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.server_id = urllib.parse.urlsplit(backend.url).netloc
        self.models: tuple[str, ...] = ()
        self.adapters: frozenset[str] = frozenset()
        """Names in `models` that are adapters of another."""
        self.used_s: dict[str, float] = {}
        """When each model was asked for last."""
        self.is_there = False
        self.is_draining = False
        self.last_failure = ""
        self.breaker = CircuitBreaker()
        self.sent: dict[str, Sent] = {}
        self.prefixes = SentPrefixes(self._num_blocks(None))
        self.last_load: InstanceLoad | None = None
        self.reported_s: float | None = None
        self.engine: str | None = None
        self._session = session
        self._changed, self._reported = changed, reported
        self._clock = clock
        self._sequence = 0
        self._asked_models_s = float("-inf")
        self._failures = FailureLog(logger)

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers that authorise the proxy at this server, if it has a key of its own."""
        key = self.backend.api_key
        return {"Authorization": f"Bearer {key}"} if key else {}

    def spec(self) -> InstanceSpec:
        """Properties of the server that never change."""
        return InstanceSpec(
            instance_id=self.server_id,
            num_total_blocks=self._num_blocks(None),
            block_size=BLOCK_SIZE,
            role=self.backend.role,
        )

    async def watch(self) -> None:
        """Ask it again and again, until cancelled."""
        while True:
            now_s = self._clock()
            if not self.breaker.is_open or self.breaker.may_try(now_s):
                await self._look(now_s)
            await asyncio.sleep(WATCH_INTERVAL_S)

    def failed(self, reason: str, *, is_dead: bool = False) -> None:
        """A request failed at it."""
        self.last_failure = reason
        if self.breaker.failed(self._clock(), is_dead=is_dead):
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        if self.is_there:
            self._failures.warned("lost", "%s is left alone: %s", self.server_id, reason)
            self.is_there = False
            self.prefixes.clear()
            self._changed(self)

    async def _look(self, now_s: float) -> None:
        received = [request_id for request_id, sent in self.sent.items() if not sent.is_reported]
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                # A server without this page is well if it tells its models.
                status, _ = await self._get("/health")
                if status >= 500:
                    raise aiohttp.ClientError(f"/health answers {status}")
                if not self.is_there or now_s - self._asked_models_s >= MODELS_INTERVAL_S:
                    await self.ask_models()
                status, page = await self._get("/metrics")
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            reason = str(error) or type(error).__name__
            self.last_failure = reason
            if self.breaker.is_open:
                self.breaker.unwell(now_s)
            elif self.is_there:
                self.failed(reason)
            else:
                self.breaker.failed(now_s, is_dead=True)
            return
        self.breaker.close()
        if not self.is_there:
            logger.info("%s serves %s", self.server_id, ", ".join(self.models))
            self.is_there = True
            self._changed(self)
        self._report(received, self._load_of(page) if status == 200 else None)

    async def _get(self, path: str) -> tuple[int, str]:
        url = f"{self.backend.url}{path}"
        async with self._session.get(url, headers=self.headers) as response:
            return response.status, await response.text(errors="replace")

    async def ask_models(self) -> None:
        """Learn what it serves now.

        Raises:
            aiohttp.ClientError, OSError, ValueError: it does not say.
        """
        url = f"{self.backend.url}/v1/models"
        async with self._session.get(url, headers=self.headers) as response:
            if response.status != 200:
                raise aiohttp.ClientError(f"/v1/models answers {response.status}")
            entries = _entries(await response.json(content_type=None))
        models = tuple(entries)
        if not models:
            raise ValueError("/v1/models names no model")
        self._asked_models_s = self._clock()
        self.adapters = frozenset(name for name, entry in entries.items() if entry.get("parent"))
        if models != self.models:
            self.models = models
            if self.is_there:
                self._changed(self)

    def _load_of(self, page: str) -> ServerLoad | None:
        try:
            load = read_load(page)
        except ValueError as error:
            self._failures.warned("metrics", "%s: /metrics: %s", self.server_id, error)
            return None
        self.engine = load.engine if load is not None else None
        return load

    def _report(self, received: Sequence[str], load: ServerLoad | None) -> None:
        self._sequence += 1
        for request_id in received:
            if request_id in self.sent:
                self.sent[request_id].is_reported = True
        num_blocks = self._num_blocks(load)
        self.prefixes.max_blocks = num_blocks
        # The scheduler itself counts those that it has not been told of.
        known = [sent for sent in self.sent.values() if sent.is_reported]
        pending = [sent.num_prompt_tokens for sent in known if not sent.has_begun]
        num_running = len(known) if load is None else load.num_running
        by_class = Counter(sent.priority for sent in known)
        # The rest has come by other ways.
        by_class[PriorityClass.NORMAL] += max(0, num_running - len(known))
        num_waiting = 0 if load is None else load.num_waiting
        # Those that wait are among those whose answer has not begun; the youngest, most likely.
        waiting = pending[len(pending) - min(num_waiting, len(pending)) :]
        self.last_load = InstanceLoad(
            instance_id=self.server_id,
            sequence=self._sequence,
            num_total_blocks=num_blocks,
            num_free_blocks=max(0, num_blocks - self._num_used_blocks(load, num_blocks)),
            num_running=num_running,
            num_waiting=num_waiting,
            num_running_by_class=tuple(sorted((+by_class).items())),
            head_of_line_blocks=num_blocks_for(waiting[0], BLOCK_SIZE) if waiting else 0,
            num_waiting_blocks=sum(num_blocks_for(tokens, BLOCK_SIZE) for tokens in waiting),
            num_waiting_tokens=sum(waiting),
            num_prefill_tokens_pending=sum(pending),
            num_prefill_pairs_pending=sum(tokens * tokens // 2 for tokens in pending),
            received_request_ids=tuple(received),
        )
        self.reported_s = self._clock()
        self._reported(self, self.last_load)

    def _num_used_blocks(self, load: ServerLoad | None, num_blocks: int) -> int:
        if load is not None and load.cache_usage is not None:
            return round(load.cache_usage * num_blocks)
        return sum(
            num_blocks_for(sent.num_prompt_tokens + sent.num_output_tokens, BLOCK_SIZE)
            for sent in self.sent.values()
            if sent.is_reported
        )

    def _num_blocks(self, load: ServerLoad | None) -> int:
        if load is not None and load.num_cache_tokens is not None:
            return max(1, load.num_cache_tokens // BLOCK_SIZE)
        return max(1, round(self.backend.weight * DEFAULT_NUM_CACHE_TOKENS / BLOCK_SIZE))


def _entries(answer: Any) -> dict[str, dict[str, Any]]:
    """Models in an answer of `/v1/models`, by name."""
    entries = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        return {}
    named = (entry for entry in entries if isinstance(entry, dict))
    return {entry["id"]: entry for entry in named if isinstance(entry.get("id"), str)}
