"""The live page: ``GET /llumsched/`` is a picture of the pool, ``GET /llumsched/live`` its frames.

Frames are server-sent events, about one a second, and the same for everybody who looks: one task
asks scheduler and frontends, and only while somebody looks. A viewer that reads too slowly misses
frames and is not waited for.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import msgspec
from fastapi import APIRouter
from fastapi.responses import HTMLResponse, StreamingResponse

from llumsched.core.types import PriorityClass
from llumsched.frontend.http.exposition import Registry
from llumsched.frontend.routing.scheduler_client import SchedulerUnavailable
from llumsched.frontend.routing.status import RequestStatus
from llumsched.places import place_lines
from llumsched.pool.instance_supervisor import InstanceSlotStatus
from llumsched.wire.control import ClusterDescription, InstanceDescription

INTERVAL_S = 1.0
DESCRIBE_TIMEOUT_S = 5.0
TTFT = "vllm:time_to_first_token_seconds"
# Quantiles are those of the requests of so many seconds.
WINDOW_S = 600.0


class RecentQuantiles:
    """Quantiles of what a histogram has counted lately, over all its labels.

    Args:
        name: of the histogram, without ``_bucket``.
    """

    def __init__(self, registry: Registry, name: str, window_s: float = WINDOW_S) -> None:
        self._registry = registry
        self._name = name
        self._window_s = window_s
        self._seen: deque[tuple[float, dict[float, float]]] = deque()

    def look(self, now_s: float) -> None:
        """Take in the counts of this moment."""
        counts: dict[float, float] = {}
        for metric in self._registry.collect():
            if metric.name == self._name:
                for sample in metric.samples:
                    if sample.name.endswith("_bucket"):
                        bound = float(sample.labels["le"])
                        counts[bound] = counts.get(bound, 0.0) + sample.value
        self._seen.append((now_s, counts))
        while len(self._seen) > 2 and self._seen[1][0] < now_s - self._window_s:
            self._seen.popleft()

    def quantile(self, share: float) -> float | None:
        """The quantile in the histogram's unit, ``None`` where nothing was counted.

        Within a bucket values are taken to be spread evenly, as Prometheus does it; beyond the last
        bound the bound is the answer.
        """
        if not self._seen:
            return None
        first, last = self._seen[0][1], self._seen[-1][1]
        if len(self._seen) == 1:
            first = {}
        bounds = sorted(last)
        counts = [max(0.0, last[bound] - first.get(bound, 0.0)) for bound in bounds]
        if not counts or not counts[-1]:
            return None
        rank = share * counts[-1]
        below, below_count = 0.0, 0.0
        for bound, count in zip(bounds, counts, strict=True):
            if count >= rank:
                if bound == float("inf"):
                    return below
                inside = count - below_count
                return below + (bound - below) * ((rank - below_count) / inside if inside else 1.0)
            below, below_count = bound, count
        return below


class LiveFeed:
    """Frames for everybody who looks.

    Args:
        describe: asks the scheduler for the pool.
        requests: asks all frontends for their unfinished requests.
        places: every place of an instance, as the launcher has told it.
        block_size: tokens of a KV block; asked for each frame, since engines choose it.
    """

    def __init__(
        self,
        describe: Callable[[], Awaitable[ClusterDescription]],
        requests: Callable[[], Awaitable[Sequence[RequestStatus]]],
        places: Callable[[], Sequence[InstanceSlotStatus]],
        block_size: Callable[[], int],
        registry: Registry,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._describe = describe
        self._requests = requests
        self._places = places
        self._block_size = block_size
        self._ttft = RecentQuantiles(registry, TTFT)
        self._interval_s = interval_s
        self._clock = clock
        self._viewers: set[asyncio.Queue[bytes]] = set()
        self._task: asyncio.Task[None] | None = None
        self._last: dict[str, Any] = {"policy": "", "instances": [], "queued": {}, "migrations": {}}

    async def frames(self) -> AsyncIterator[bytes]:
        """Server-sent events until the viewer leaves."""
        viewer: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1)
        self._viewers.add(viewer)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="live-page")
        try:
            while True:
                yield await viewer.get()
        finally:
            self._viewers.discard(viewer)

    async def _run(self) -> None:
        while self._viewers:
            frame = b"data: " + msgspec.json.encode(await self._frame()) + b"\n\n"
            for viewer in self._viewers:
                if not viewer.full():
                    viewer.put_nowait(frame)
            await asyncio.sleep(self._interval_s)

    async def _frame(self) -> dict[str, Any]:
        error = ""
        requests: Sequence[RequestStatus] = ()
        try:
            requests = await self._requests()
        except TimeoutError:
            error = "a frontend does not answer: its requests are not shown"
        try:
            self._last = _cluster(await self._describe())
        except SchedulerUnavailable as unavailable:
            error = str(unavailable)
        now_s = self._clock()
        self._ttft.look(now_s)
        return {
            "num_finished": 0,
            "scheduler_age_s": 0.0,
            **self._last,
            "at_s": now_s,
            "wall_s": time.time(),
            "error": error,
            "places": place_lines([asdict(place) for place in self._places()]),
            "block_size": self._block_size(),
            "num_tokens_passed": self._last.get("num_output_tokens", 0)
            + sum(request.num_output_tokens for request in requests),
            "ttft_p50_s": self._ttft.quantile(0.5),
            "ttft_p99_s": self._ttft.quantile(0.99),
            "requests": [_request(request) for request in requests],
        }


def live_router(feed: LiveFeed) -> APIRouter:
    """The page and its frames, below the prefix of the admin API."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE)

    @router.get("/live")
    async def live() -> StreamingResponse:
        return StreamingResponse(
            feed.frames(),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )

    return router


def _cluster(cluster: ClusterDescription) -> dict[str, Any]:
    return {
        "policy": cluster.policy,
        "scheduler_age_s": cluster.scheduler_age_s,
        "instances": [_instance(instance) for instance in cluster.instances],
        "queued": cluster.queued,
        "migrations": cluster.migrations,
        "num_finished": cluster.num_finished_requests,
        "num_output_tokens": cluster.num_output_tokens,
    }


def _instance(instance: InstanceDescription) -> dict[str, Any]:
    load = instance.load
    return {
        "id": instance.instance_id,
        "state": instance.state,
        "role": instance.role,
        "freeness": instance.freeness,
        "report_age_s": instance.report_age_s,
        "cannot_migrate": instance.cannot_migrate,
        "total": load.num_total_blocks if load else 0,
        "free": load.num_free_blocks if load else 0,
        "reserved": load.num_reserved_blocks if load else 0,
        "running": load.num_running if load else 0,
        "waiting": load.num_waiting if load else 0,
        "head_blocks": load.head_of_line_blocks if load else 0,
        "step_s": load.step_time_s if load else 0.0,
    }


def _request(request: RequestStatus) -> dict[str, Any]:
    return {
        "id": request.request_id,
        "external_id": request.external_id,
        "frontend": request.frontend_id,
        "instance": request.instance_id,
        "prompt": request.num_prompt_tokens,
        "outputs": request.num_output_tokens,
        "moves": request.num_moves,
        "resumptions": request.num_resumptions,
        "class": PriorityClass(request.priority_class).name.lower(),
    }


def _page() -> str:
    folder = files("llumsched.frontend.http") / "live_page"
    page, style, *scripts = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("page.html", "style.css", "script.js", "paint.js", "start.js")
    )
    return page.replace("/*STYLE*/", style).replace("/*SCRIPT*/", "".join(scripts))


PAGE = _page()
