"""A scripted incident for the live page: one instance crowded, one drained, one killed, one new.

    python -m tests.frontend.live_incident PORT [INSTANCES REQUESTS]

serves the page over a pool that is made up; nothing of it runs a model. The same seed gives the
same incident; a stepped one goes on only when it is told to, so that its pictures do not depend on
the speed of the machine.
"""

from __future__ import annotations

import asyncio
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry, Histogram

from llumsched.core.load import InstanceLoad
from llumsched.frontend.http.live import TTFT, LiveFeed, live_router
from llumsched.frontend.routing.status import RequestStatus
from llumsched.pool.instance_supervisor import InstanceSlotStatus
from llumsched.wire.control import ClusterDescription, InstanceDescription

BLOCK_SIZE = 16
NUM_BLOCKS = 2300
TOKENS_PER_S = 14.0
# Seconds after the beginning.
CROWDED_S, RELIEVED_S, DRAINED_S, KILLED_S, REPLACED_S = 3.0, 8.0, 12.0, 18.0, 22.0
CROWDED, DRAINED, KILLED = 1, 2, 3
# The burst, of those that are there before.
CROWD = 0.42


@dataclass(slots=True)
class Slot:
    """A request; when its answer is complete the next one takes its place."""

    number: int
    prompt: int
    length: float
    began_s: float
    home: int
    generation: int = 0
    moves: int = 0
    resumptions: int = 0
    waits: bool = False
    is_of_crowd: bool = False
    steps: list[dict[str, Any]] = field(default_factory=list)

    def outputs(self, now_s: float) -> int:
        """Tokens so far."""
        return 0 if self.waits else max(0, int((now_s - self.began_s) * TOKENS_PER_S))

    def blocks(self, now_s: float) -> int:
        """KV blocks that the request holds."""
        return math.ceil((self.prompt + self.outputs(now_s)) / BLOCK_SIZE)


class Incident:
    """A pool of so many instances, as it is ``seconds`` after the beginning.

    When all of the burst are there they are ``num_requests``.

    From 3 s on a burst of long prompts crowds instance-1; from 8 s on requests leave it; from 12 s
    on instance-2 is drained; at 18 s instance-3 dies and its requests go on elsewhere; at 22 s an
    instance comes in its place.
    """

    def __init__(
        self, num_instances: int, num_requests: int, *, is_stepped: bool = False, from_s: float = 0
    ) -> None:
        self.num_instances = num_instances
        self.num_requests = num_requests
        self.num_usual = round(num_requests / (1 + CROWD))
        self.registry = CollectorRegistry()
        self._ttft = Histogram(TTFT, "", registry=self.registry)
        self._random = random.Random(7)
        self._started_s = time.monotonic() - from_s
        self._now_s = from_s
        self._steps = asyncio.Queue[float]() if is_stepped else None
        self._held = [0] * (num_instances + 1)
        self._num_finished = self._num_moved = 0
        self._slots = [self._slot(number, from_s) for number in range(self.num_usual)]

    @property
    def is_stepped(self) -> bool:
        """True if frames are made one by one, by ``step``."""
        return self._steps is not None

    def seconds(self) -> float:
        """Since the beginning."""
        return self._now_s

    def step(self, to_s: float) -> None:
        """Let one more frame be made, of this second."""
        assert self._steps is not None
        self._steps.put_nowait(to_s)

    def _slot(self, number: int, now_s: float) -> Slot:
        length = self._random.randint(250, 1100)
        done = self._random.uniform(0, 0.9) * length
        slot = Slot(number, self._prompt(), length, now_s - done / TOKENS_PER_S, home=0)
        self._put(
            slot,
            self._freest(
                self._random.sample(range(self.num_instances), min(2, self.num_instances))
            ),
            "placed",
        )
        return slot

    def _prompt(self) -> int:
        return self._random.randint(60, 1100)

    def _freest(self, among: Sequence[int]) -> int:
        return min(among, key=self._held.__getitem__)

    def _put(self, slot: Slot, home: int, kind: str) -> None:
        blocks = slot.blocks(self._now_s)
        candidates = sorted(range(self.num_instances), key=self._held.__getitem__)[:3]
        if kind != "placed":
            self._held[slot.home] -= blocks
        slot.home = home
        self._held[home] += blocks
        slot.steps.append(
            {
                "at_s": 1.7e9 + self._now_s,
                "kind": kind,
                "text": {
                    "placed": "freest",
                    "moved": f"{blocks} blocks in 3 stages, paused 8 ms",
                    "resumed": f"instance-{KILLED} was lost",
                }[kind],
                "instance_id": f"instance-{home}",
                "migration_id": None,
                "scored_by": "freeness",
                "candidates": [
                    {
                        "instance_id": f"instance-{c}",
                        "num_free_blocks": NUM_BLOCKS - self._held[c],
                        "num_total_blocks": NUM_BLOCKS,
                        "num_running": 20,
                        "num_waiting": 0,
                        "score": (NUM_BLOCKS - self._held[c]) / 20,
                    }
                    for c in candidates
                    if kind == "placed"
                ],
            }
        )

    def _move(self, slot: Slot, home: int) -> None:
        self._put(slot, home, "moved")
        slot.moves += 1
        self._num_moved += 1

    def advance(self, now_s: float) -> None:
        """Where every request is now."""
        self._now_s = now_s
        is_hot = CROWDED_S < now_s < RELIEVED_S + 2
        self._ttft.observe(abs(self._random.gauss(0.12, 0.05)) + (0.8 if is_hot else 0))
        self._held = [0] * (self.num_instances + 1)
        for slot in self._slots:
            self._held[slot.home] += slot.blocks(now_s)
        self._end_and_begin(now_s)
        batch = max(3, self.num_usual // 30)
        if now_s >= RELIEVED_S:
            self._relieve(CROWDED, batch)
        if now_s >= DRAINED_S:
            for slot in [s for s in self._slots if s.home == DRAINED][:batch]:
                self._move(slot, self._freest(self._accepting()))
        if now_s >= KILLED_S:
            for slot in [s for s in self._slots if s.home == KILLED]:
                self._put(slot, self._freest(self._accepting()), "resumed")
                slot.resumptions += 1
        if now_s >= REPLACED_S:
            fullest = max(self._accepting(), key=self._held.__getitem__)
            self._relieve(fullest, batch)
        self._wait()

    def _end_and_begin(self, now_s: float) -> None:
        for slot in self._slots:
            if not slot.is_of_crowd and slot.outputs(now_s) >= slot.length:
                self._held[slot.home] -= slot.blocks(now_s)
                self._num_finished += 1
                slot.prompt, slot.began_s = self._prompt(), now_s
                slot.generation += 1
                slot.moves = slot.resumptions = 0
                slot.steps = []
                self._put(slot, self._freest(self._accepting()), "placed")
        due = min(1.0, max(0.0, (now_s - CROWDED_S) / 2)) * (self.num_requests - self.num_usual)
        while len(self._slots) - self.num_usual < int(due):
            slot = Slot(len(self._slots), self._random.randint(500, 1100), 0, now_s, home=CROWDED)
            slot.is_of_crowd = True
            self._put(slot, min(CROWDED, self.num_instances - 1), "placed")
            self._slots.append(slot)

    def _accepting(self) -> list[int]:
        gone = {DRAINED} if self._now_s >= DRAINED_S else set()
        gone |= {KILLED} if self._now_s >= KILLED_S else set()
        if self._now_s < KILLED_S and self._now_s >= CROWDED_S:
            gone |= {CROWDED}
        known = range(self.num_instances + (self._now_s >= REPLACED_S))
        return [i for i in known if i not in gone] or [0]

    def _relieve(self, crowded: int, batch: int) -> None:
        accepting = self._accepting()
        mean = sum(self._held[i] for i in accepting) / len(accepting)
        here = sorted(
            (s for s in self._slots if s.home == crowded), key=lambda s: (not s.waits, s.number)
        )
        for slot in here[:batch]:
            if self._held[crowded] > 1.15 * mean:
                slot.waits = False
                self._move(slot, self._freest([i for i in accepting if i != crowded]))

    def _wait(self) -> None:
        room = [NUM_BLOCKS] * len(self._held)
        for slot in self._slots:
            waited, slot.waits = slot.waits, False
            blocks = slot.blocks(self._now_s)
            slot.waits = blocks > room[slot.home]
            if waited and not slot.waits:
                slot.began_s = self._now_s
            if not slot.waits:
                room[slot.home] -= blocks

    async def requests(self) -> Sequence[RequestStatus]:
        """Every request, where it is."""
        if self._steps is not None:
            self.advance(await self._steps.get())
        else:
            self.advance(time.monotonic() - self._started_s)
        return [
            RequestStatus(
                request_id=f"{_name(slot)}-0",
                external_id=_name(slot),
                frontend_id="frontend-0",
                instance_id=f"instance-{slot.home}",
                num_output_tokens=slot.outputs(self._now_s),
                num_moves=slot.moves,
                num_resumptions=slot.resumptions,
                num_prompt_tokens=slot.prompt,
                priority_class=int(slot.number % 17 == 0),
            )
            for slot in self._slots
        ]

    def steps(self, request_id: str) -> dict[str, Any]:
        """A request's steps, as the scheduler tells them."""
        found = [slot for slot in self._slots if f"{_name(slot)}-0" == request_id]
        return {"requests": {f"{_name(slot)}-0": slot.steps for slot in found}}

    def places(self) -> list[InstanceSlotStatus]:
        """Places of instances, as a launcher tells them."""
        killed = self.num_instances > KILLED and self._now_s >= KILLED_S
        return [
            InstanceSlotStatus(
                instance_id=f"instance-{self.num_instances if is_killed else index}",
                pid=None,
                state="booting" if is_killed and self._now_s < REPLACED_S else "running",
                num_deaths=int(is_killed),
                last_failure="its process was killed (SIGKILL)" if is_killed else "",
                retry_in_s=None,
            )
            for index in range(self.num_instances)
            for is_killed in [killed and index == KILLED]
        ]

    async def describe(self) -> ClusterDescription:
        """The pool, as a scheduler tells it."""
        now_s = self._now_s
        at: list[list[Slot]] = [[] for _ in self._held]
        for slot in self._slots:
            at[slot.home].append(slot)
        instances = []
        for index, here in enumerate(at):
            is_killed = index == KILLED and now_s >= KILLED_S
            if is_killed or (index == self.num_instances and now_s < REPLACED_S):
                continue
            running, waiting = (
                [s for s in here if not s.waits],
                [s for s in here if s.waits],
            )
            used = min(NUM_BLOCKS, sum(s.blocks(now_s) for s in running))
            is_destination = index == 0 and RELIEVED_S < now_s < DRAINED_S
            reserved = min(NUM_BLOCKS - used, 90 if is_destination else 0)
            load = InstanceLoad(
                instance_id=f"instance-{index}",
                sequence=int(now_s * 10),
                num_total_blocks=NUM_BLOCKS,
                num_free_blocks=NUM_BLOCKS - used - reserved,
                num_reserved_blocks=reserved,
                num_running=len(running),
                num_waiting=len(waiting),
                head_of_line_blocks=waiting[0].blocks(now_s) if waiting else 0,
                step_time_s=0.021 + 0.0004 * len(running),
            )
            is_draining = index == DRAINED and now_s >= DRAINED_S
            instances.append(
                InstanceDescription(
                    instance_id=load.instance_id,
                    state="draining" if is_draining else "serving",
                    role="mixed",
                    freeness=(NUM_BLOCKS - used) / max(1, len(running)),
                    report_age_s=0.05,
                    load=load,
                )
            )
        return ClusterDescription(
            call_id=0,
            policy="adaptive",
            scheduler_age_s=4000 + now_s,
            instances=instances,
            migrations={"committed": self._num_moved},
            queued={"normal": 3} if CROWDED_S + 2 < now_s < RELIEVED_S + 1 else {},
            num_finished_requests=self._num_finished,
            num_output_tokens=self._num_finished * 500,
        )


def _name(slot: Slot) -> str:
    return f"cmpl-{slot.generation:02d}{slot.number:04d}"


def app_of(incident: Incident) -> FastAPI:
    """The live page over the incident."""
    app = FastAPI()
    router = APIRouter(prefix="/llumsched")
    feed = LiveFeed(
        incident.describe,
        incident.requests,
        incident.places,
        lambda: BLOCK_SIZE,
        incident.registry,
        interval_s=0.0 if incident.is_stepped else 0.5,
        clock=incident.seconds,
    )
    router.include_router(live_router(feed))
    router.get("/requests/{request_id}/trace")(incident.steps)
    app.include_router(router)
    return app


if __name__ == "__main__":
    port, *sizes = map(int, sys.argv[1:])
    instances, requests = sizes or (6, 128)
    uvicorn.run(
        app_of(Incident(instances, requests)), host="127.0.0.1", port=port, log_level="warning"
    )
