"""Write the decision log that the documentation replays: ``docs/example-decisions.jsonl``.

Three pretended instances, and later a fourth, decode at a fixed speed and report twice a second;
thirty clients send chats that get longer; the default policy decides. It is an example of a log,
not a measurement of anything. Run it again when decisions change: a test replays the log.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from llumsched.config import Config, build_bundle
from llumsched.core.actions import DispatchRequest, StartMigration
from llumsched.core.events import (
    Event,
    InstanceJoined,
    LoadReported,
    MigrationFinished,
    MigrationOutcome,
    RequestArrived,
    RequestFinished,
    Ticked,
)
from llumsched.core.load import InstanceLoad, InstanceSpec
from llumsched.core.scheduling.scheduler import GlobalScheduler
from llumsched.core.types import SchedulingRequest, num_blocks_for
from llumsched.decision_log import DecisionLog, segments_of

PATH = Path(__file__).parents[1] / "docs" / "example-decisions.jsonl"
NUM_INSTANCES = 4
NUM_CLIENTS = 30
NUM_REQUESTS = 120
BLOCK_SIZE = 16
TOTAL_BLOCKS = 550
TOKENS_PER_S = 25.0
REPORT_INTERVAL_S = 0.5
# The last instance joins when the others are busy, so that there is something to migrate.
LAST_JOINS_S = 12.0


@dataclass
class Running:
    """A request that decodes."""

    num_prompt_tokens: int
    num_output_tokens: float
    num_left: float

    @property
    def num_blocks(self) -> int:
        return num_blocks_for(self.num_prompt_tokens + int(self.num_output_tokens), BLOCK_SIZE)


@dataclass
class Instance:
    """Requests of one instance, and changes that it has not reported yet."""

    running: dict[str, Running] = field(default_factory=dict)
    waiting: dict[str, Running] = field(default_factory=dict)
    received: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    sequence: int = 0

    @property
    def num_free_blocks(self) -> int:
        return max(0, TOTAL_BLOCKS - sum(r.num_blocks for r in self.running.values()))

    def admit(self) -> None:
        """First come, first served, while the next one fits."""
        while self.waiting:
            request_id, first = next(iter(self.waiting.items()))
            if first.num_blocks > self.num_free_blocks:
                return
            self.running[request_id] = self.waiting.pop(request_id)

    def report(self, instance_id: str) -> InstanceLoad:
        self.sequence += 1
        waiting = [r.num_blocks for r in self.waiting.values()]
        load = InstanceLoad(
            instance_id=instance_id,
            sequence=self.sequence,
            num_total_blocks=TOTAL_BLOCKS,
            num_free_blocks=self.num_free_blocks,
            num_running=len(self.running),
            num_waiting=len(waiting),
            head_of_line_blocks=waiting[0] if waiting else 0,
            num_waiting_blocks=sum(waiting),
            step_time_s=1 / TOKENS_PER_S,
            num_running_by_class=((0, len(self.running)),),
            received_request_ids=tuple(self.received),
            finished_request_ids=tuple(self.finished),
        )
        self.received, self.finished = [], []
        return load


class Example:
    """The pretended deployment."""

    def __init__(self, folder: Path) -> None:
        config = Config.default()
        self.rng = random.Random(2024)
        self.scheduler = GlobalScheduler(build_bundle(config), seed=config.seed)
        self.log = DecisionLog(folder, config, self.scheduler.checkpoint)
        self.instances: dict[str, Instance] = {}
        self.requests: dict[str, Running] = {}
        self.now = 0.0

    def run(self) -> None:
        arrivals = sorted(self.rng.uniform(0, 25) for _ in range(NUM_REQUESTS))
        turns = [0] * NUM_CLIENTS
        for number in range(NUM_INSTANCES - 1):
            self.join(f"instance-{number}")
        next_report_s = 0.0
        for number, arrival_s in enumerate(arrivals):
            while next_report_s <= arrival_s:
                if next_report_s == LAST_JOINS_S:
                    self.join(f"instance-{NUM_INSTANCES - 1}")
                self.advance(next_report_s)
                next_report_s += REPORT_INTERVAL_S
            client = self.rng.randrange(NUM_CLIENTS)
            turns[client] += 1
            self.arrive(f"request-{number:03}", f"client-{client}", turns[client], arrival_s)
        self.log.close()

    def join(self, instance_id: str) -> None:
        self.instances[instance_id] = Instance()
        spec = InstanceSpec(
            instance_id=instance_id, num_total_blocks=TOTAL_BLOCKS, block_size=BLOCK_SIZE
        )
        self.handle(InstanceJoined(spec=spec))

    def arrive(self, request_id: str, client_id: str, turn: int, now: float) -> None:
        self.now = round(now, 4)
        num_prompt_tokens = 100 * turn + self.rng.randrange(200)
        num_output_tokens = self.rng.randrange(100, 900)
        self.requests[request_id] = Running(num_prompt_tokens, 0.0, num_output_tokens)
        request = SchedulingRequest(
            request_id=request_id,
            num_prompt_tokens=num_prompt_tokens,
            arrival_s=self.now,
            client_id=client_id,
        )
        self.handle(RequestArrived(request=request))

    def advance(self, now: float) -> None:
        """Decode until now, tell what ended, report, tick."""
        num_tokens = TOKENS_PER_S * REPORT_INTERVAL_S
        self.now = now
        for instance in self.instances.values():
            for request_id, running in list(instance.running.items()):
                running.num_output_tokens += num_tokens
                running.num_left -= num_tokens
                if running.num_left <= 0:
                    del instance.running[request_id]
                    instance.finished.append(request_id)
                    told = RequestFinished(
                        request_id=request_id, num_output_tokens=int(running.num_output_tokens)
                    )
                    self.handle(told)
        for instance_id, instance in self.instances.items():
            instance.admit()
            self.handle(LoadReported(load=instance.report(instance_id)))
        self.handle(Ticked())

    def handle(self, event: Event) -> None:
        actions = self.scheduler.handle(event, self.now)
        self.log.write(self.now, event, actions)
        for action in actions:
            if isinstance(action, DispatchRequest):
                instance = self.instances[action.instance_id]
                instance.waiting[action.request_id] = self.requests[action.request_id]
                instance.received.append(action.request_id)
            elif isinstance(action, StartMigration):
                self.migrate(action)

    def migrate(self, action: StartMigration) -> None:
        """Every migration succeeds, at once."""
        source, destination = self.instances[action.source], self.instances[action.destination]
        chosen = min(source.running, key=lambda r: source.running[r].num_blocks, default=None)
        if chosen is not None:
            destination.running[chosen] = source.running.pop(chosen)
            destination.received.append(chosen)
        committed, nothing = MigrationOutcome.COMMITTED, MigrationOutcome.NOTHING_TO_MOVE
        self.handle(
            MigrationFinished(
                migration_id=action.migration_id,
                request_id=chosen,
                source=action.source,
                destination=action.destination,
                outcome=committed if chosen is not None else nothing,
            )
        )


def main() -> int:
    """Write the log."""
    with tempfile.TemporaryDirectory() as folder:
        Example(Path(folder)).run()
        (segment,) = segments_of(Path(folder))
        shutil.copyfile(segment, PATH)
    print(f"written: {PATH} ({PATH.stat().st_size / 1000:.0f} kB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
