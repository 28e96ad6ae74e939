"""Values with defaults, so that a test names only what it is about."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llumsched.core.actions import Action
from llumsched.core.events import Event, InstanceJoined, LoadReported, RequestArrived
from llumsched.core.load import InstanceLoad, InstanceSpec
from llumsched.core.options import SchedulerOptions
from llumsched.core.policy import PolicyBundle
from llumsched.core.scheduling.scheduler import GlobalScheduler
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import SchedulingRequest
from llumsched.policies.freeness import Freeness
from tests.core.invariants import check_invariants

TOTAL_BLOCKS = 100
BLOCK_SIZE = 16


def make_spec(instance_id: str = "a", **changes: Any) -> InstanceSpec:
    return InstanceSpec(
        **{
            "instance_id": instance_id,
            "num_total_blocks": TOTAL_BLOCKS,
            "block_size": BLOCK_SIZE,
            **changes,
        }
    )


def make_load(
    instance_id: str = "a", *, num_used_blocks: int = 0, sequence: int = 1, **changes: Any
) -> InstanceLoad:
    total = changes.pop("num_total_blocks", TOTAL_BLOCKS)
    return InstanceLoad(
        **{
            "instance_id": instance_id,
            "sequence": sequence,
            "num_total_blocks": total,
            "num_free_blocks": total - num_used_blocks,
            "num_running": 1 if num_used_blocks else 0,
            **changes,
        }
    )


def make_request(
    request_id: str = "r", *, num_blocks: int = 1, **changes: Any
) -> SchedulingRequest:
    return SchedulingRequest(
        **{"request_id": request_id, "num_prompt_tokens": num_blocks * BLOCK_SIZE, **changes}
    )


class Driver:
    """A scheduler with a clock that stands still until it is moved; checks itself after events."""

    def __init__(
        self, bundle: PolicyBundle | None = None, *, seed: int = 0, **options: Any
    ) -> None:
        bundle = bundle if bundle is not None else PolicyBundle(name="test", dispatch=Freeness())
        changed = {name: getattr(bundle.options, name) for name in options_of(bundle)} | options
        self.scheduler = GlobalScheduler(bundle, SchedulerOptions(**changed), seed=seed)
        self.now = 0.0
        self.sequence = 0

    def handle(self, event: Event) -> tuple[Action, ...]:
        actions = self.scheduler.handle(event, self.now)
        check_invariants(self.scheduler)
        return actions

    def join(self, *instance_ids: str, **changes: Any) -> None:
        for instance_id in instance_ids:
            self.handle(InstanceJoined(spec=make_spec(instance_id, **changes)))

    def report(self, instance_id: str, **changes: Any) -> tuple[Action, ...]:
        self.sequence += 1
        load = make_load(instance_id, **{"sequence": self.sequence, **changes})
        return self.handle(LoadReported(load=load))

    def arrive(self, request_id: str = "r", **changes: Any) -> tuple[Action, ...]:
        return self.handle(RequestArrived(request=make_request(request_id, **changes)))

    @property
    def cluster(self) -> ClusterSnapshot:
        return self.scheduler.snapshot(self.now)


def options_of(bundle: PolicyBundle) -> Iterable[str]:
    return type(bundle.options).__dataclass_fields__
