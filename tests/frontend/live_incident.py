"""A scripted incident for the live page: one instance crowded, one drained, one killed.

    python -m tests.frontend.live_incident PORT [INSTANCES REQUESTS]

serves the page over a pool that is made up; nothing of it runs a model.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence

import uvicorn
from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry, Histogram

from llumsched.core.load import InstanceLoad
from llumsched.frontend.http.live import TTFT, LiveFeed, live_router
from llumsched.frontend.routing.status import RequestStatus
from llumsched.wire.control import ClusterDescription, InstanceDescription

BLOCK_SIZE = 16
NUM_BLOCKS = 1600


class Incident:
    """A pool of so many instances, as it is ``seconds`` after the beginning.

    From 4 s on instance-1 is crowded; from 8 s on requests leave it; from 12 s on instance-2 is
    drained; at 18 s instance-3 is gone.
    """

    def __init__(self, num_instances: int, num_requests: int) -> None:
        self.num_instances = num_instances
        self.num_requests = num_requests
        self.started_s = time.monotonic()
        self.registry = CollectorRegistry()
        self._ttft = Histogram(TTFT, "", registry=self.registry)
        self._random = random.Random(7)
        self._prompts = [self._random.randint(60, 1400) for _ in range(num_requests)]
        self._homes = [self._random.randrange(num_instances) for _ in range(num_requests)]
        self._counts = Counter(self._homes)
        self._moves = [0] * num_requests

    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.started_s

    def advance(self) -> None:
        """Where every request is now."""
        now_s = self.seconds()
        self._ttft.observe(abs(self._random.gauss(0.12, 0.05)) + (0.8 if 4 < now_s < 10 else 0))
        order = range(self.num_requests)
        if 4 < now_s < 8:
            for request in order[: self.num_requests // 3]:
                self._homes[request] = min(1, self.num_instances - 1)
            self._counts = Counter(self._homes)
        elif now_s >= 8:
            crowded = [r for r in order if self._homes[r] == 1]
            share = self.num_requests // self.num_instances
            for request in crowded[share:][: max(2, len(crowded) // 8)]:
                self._move(request, self._freest(avoid={1}))
        for instance, leaves_s in ((2, 12.0), (3, 18.0)):
            if now_s >= leaves_s:
                for request in [r for r in order if self._homes[r] == instance][:8]:
                    self._move(request, self._freest(avoid={1, 2, 3}))

    def _freest(self, avoid: set[int]) -> int:
        others = [i for i in range(self.num_instances) if i not in avoid] or [0]
        return min(others, key=self._counts.__getitem__)

    def _move(self, request: int, to: int) -> None:
        if self._homes[request] != to:
            self._counts[self._homes[request]] -= 1
            self._counts[to] += 1
            self._homes[request] = to
            self._moves[request] += 1

    async def requests(self) -> Sequence[RequestStatus]:
        """Every request, where it is."""
        self.advance()
        grown = int(self.seconds() * 12)
        return [
            RequestStatus(
                request_id=f"cmpl-{r:05d}-0",
                external_id=f"cmpl-{r:05d}",
                frontend_id="frontend-0",
                instance_id=f"instance-{self._homes[r]}",
                num_output_tokens=grown + r % 37,
                num_moves=self._moves[r],
                num_resumptions=0,
                num_prompt_tokens=self._prompts[r],
                priority_class=int(r % 17 == 0),
            )
            for r in range(self.num_requests)
        ]

    async def describe(self) -> ClusterDescription:
        """The pool, as a scheduler tells it."""
        now_s = self.seconds()
        instances = []
        at: list[list[int]] = [[] for _ in range(self.num_instances)]
        for request, home in enumerate(self._homes):
            at[home].append(request)
        for index, here in enumerate(at):
            if index == 3 and now_s >= 18 and not here:
                continue
            held = sum(
                math.ceil((self._prompts[r] + now_s * 12 + r % 37) / BLOCK_SIZE) for r in here
            )
            used = min(NUM_BLOCKS - 4, held)
            reserved = min(NUM_BLOCKS - used, 60 if index == 0 and now_s > 8 else 0)
            load = InstanceLoad(
                instance_id=f"instance-{index}",
                sequence=int(now_s * 10),
                num_total_blocks=NUM_BLOCKS,
                num_free_blocks=NUM_BLOCKS - used - reserved,
                num_reserved_blocks=reserved,
                num_running=len(here),
                num_waiting=6 if index == 1 and 4 < now_s < 10 else 0,
                step_time_s=0.021 + 0.0004 * len(here),
            )
            draining = index == 2 and now_s >= 12
            instances.append(
                InstanceDescription(
                    instance_id=load.instance_id,
                    state="draining" if draining else "serving",
                    role="mixed",
                    freeness=(NUM_BLOCKS - used) / max(1, len(here)),
                    report_age_s=0.05,
                    load=load,
                )
            )
        return ClusterDescription(
            call_id=0,
            policy="adaptive",
            scheduler_age_s=4000 + now_s,
            instances=instances,
            migrations={"committed": sum(self._moves)},
            queued={"normal": 3} if 5 < now_s < 9 else {},
            num_finished_requests=int(now_s * 3),
            num_output_tokens=int(now_s * 900),
        )


def app_of(incident: Incident) -> FastAPI:
    """The live page over the incident."""
    app = FastAPI()
    router = APIRouter(prefix="/llumsched")
    feed = LiveFeed(
        incident.describe, incident.requests, lambda: BLOCK_SIZE, incident.registry, interval_s=0.5
    )
    router.include_router(live_router(feed))
    app.include_router(router)
    return app


if __name__ == "__main__":
    port, *sizes = map(int, sys.argv[1:])
    instances, requests = sizes or (6, 90)
    uvicorn.run(
        app_of(Incident(instances, requests)), host="127.0.0.1", port=port, log_level="warning"
    )
