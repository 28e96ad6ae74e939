"""Random event streams, every bundle: nothing lost, nothing doubled, everything reconciled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llumsched.config import Config, build_bundle
from llumsched.core.events import MigrationRequested, ScaleRequested
from llumsched.core.policy import MigrationPair, Placement, PolicyBundle
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import SchedulingRequest
from llumsched.policies import BUILT_IN
from tests.campaigns import examples
from tests.core.world import World

BUNDLES = [name for name, target in BUILT_IN.items() if target.endswith(":bundle")] + [
    "round_robin",
    "random",
    "power_of_two",
    "least_requests",
]
CHAOS = "chaos"


class Chaos:
    """Policies that choose at random, sometimes nonsense, and sometimes raise."""

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Any:
        chosen = self._any(cluster)
        return None if chosen == "nobody" else Placement(instance_id=chosen, reason="chaos")

    def rebalance(self, cluster: ClusterSnapshot) -> Iterable[Any]:
        for _ in range(3):
            yield MigrationPair(
                source=self._any(cluster),
                destination=self._any(cluster),
                reason="chaos",
                num_requests=cluster.rng.randint(-1, 3),
                balances=cluster.rng.random() < 0.5,
            )

    def _any(self, cluster: ClusterSnapshot) -> str:
        if cluster.rng.random() < 0.1:
            raise RuntimeError("chaos")
        return cluster.rng.choice([*cluster.instance_ids, "nobody"])


def make_bundle(name: str, *, is_fair: bool = False, min_instances: int = 1) -> PolicyBundle:
    bundle = (
        PolicyBundle(name=CHAOS, dispatch=Chaos(), migration=Chaos())
        if name == CHAOS
        else build_bundle(Config.default(name))
    )
    options = dataclasses.replace(
        bundle.options,
        max_queued_requests=5,
        queue_timeout_s=20.0,
        drain_timeout_s=30.0,
        min_instances=min_instances,
        max_instances=5,
        scale_up_after_s=0.5,
        scale_down_after_s=2.0,
        scale_down_cooldown_s=5.0,
        fair_clients=is_fair,
        max_queued_per_client=3 if is_fair else 0,
        max_waiting_per_instance=2 if is_fair else 0,
    )
    return dataclasses.replace(bundle, options=options)


class SchedulerMachine(RuleBasedStateMachine):
    """The world's events in any order."""

    names = BUNDLES

    @initialize(
        name=st.data(),
        seed=st.integers(0, 3),
        num_instances=st.integers(0, 4),
        is_fair=st.booleans(),
        min_instances=st.integers(0, 1),
    )
    def start(
        self,
        name: st.DataObject,
        seed: int,
        num_instances: int,
        is_fair: bool,
        min_instances: int,
    ) -> None:
        chosen = name.draw(st.sampled_from(self.names))
        self.world = World(
            lambda: make_bundle(chosen, is_fair=is_fair, min_instances=min_instances), seed
        )
        self.num_requests = 0
        for _ in range(num_instances):
            self.world.join()

    @rule()
    @precondition(lambda self: len(self.world.instances) < 6)
    def join(self) -> None:
        self.world.join()

    @rule(fails=st.booleans())
    @precondition(lambda self: self.world.launches)
    def boot(self, fails: bool) -> None:
        self.world.boot(fails=fails)

    @rule(num_instances=st.integers(0, 6))
    def ask_for_instances(self, num_instances: int) -> None:
        self.world.handle(ScaleRequested(num_instances=num_instances))

    @rule()
    def restart_from_a_checkpoint(self) -> None:
        self.world.restart()

    @rule(data=st.data(), num_blocks=st.integers(1, 120))
    @precondition(lambda self: self.world.instances)
    def cache(self, data: st.DataObject, num_blocks: int) -> None:
        self.world.cache(data.draw(st.sampled_from(sorted(self.world.instances))), num_blocks)

    @rule(blocks=st.lists(st.integers(1, 120), min_size=1, max_size=4), high=st.booleans())
    def arrive(self, blocks: list[int], high: bool) -> None:
        for num_blocks in blocks:
            self.world.arrive(f"r{self.num_requests:03}", num_blocks, int(high))
            self.num_requests += 1

    @rule(data=st.data(), late=st.booleans())
    @precondition(lambda self: self.world.instances)
    def report(self, data: st.DataObject, late: bool) -> None:
        self.world.report(data.draw(st.sampled_from(sorted(self.world.instances))), late=late)

    @rule()
    def report_all(self) -> None:
        for instance_id in list(self.world.instances):
            self.world.report(instance_id)

    @rule()
    def deliver_late(self) -> None:
        self.world.deliver_reports()
        self.world.deliver_ends()

    @rule(data=st.data(), tell=st.booleans())
    @precondition(lambda self: self.placed())
    def finish(self, data: st.DataObject, tell: bool) -> None:
        self.world.finish(data.draw(st.sampled_from(self.placed())), tell=tell)

    @rule(data=st.data())
    @precondition(lambda self: self.world.live)
    def abort(self, data: st.DataObject) -> None:
        self.world.abort(data.draw(st.sampled_from(sorted(self.world.live))))

    @rule(data=st.data())
    @precondition(lambda self: self.not_begun() and self.serving())
    def send_elsewhere(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(self.not_begun()))
        self.world.send_elsewhere(request_id, data.draw(st.sampled_from(self.serving())))

    @rule(by_s=st.sampled_from([0.01, 0.5, 2.0, 10.0]))
    def advance(self, by_s: float) -> None:
        self.world.advance(by_s)

    @rule(data=st.data(), commits=st.booleans(), late=st.booleans())
    @precondition(lambda self: self.world.migrations)
    def end_migration(self, data: st.DataObject, commits: bool, late: bool) -> None:
        migration_id = data.draw(st.sampled_from(sorted(self.world.migrations)))
        self.world.end_migration(migration_id, commits=commits, late=late)

    @rule(data=st.data())
    @precondition(lambda self: self.world.live and self.world.instances)
    def ask_for_migration(self, data: st.DataObject) -> None:
        self.world.handle(
            MigrationRequested(
                request_id=data.draw(st.sampled_from(sorted(self.world.live))),
                destination=data.draw(st.none() | st.sampled_from(sorted(self.world.instances))),
            )
        )

    @rule(data=st.data(), deadline_s=st.none() | st.floats(0, 20))
    @precondition(lambda self: self.world.instances)
    def drain(self, data: st.DataObject, deadline_s: float | None) -> None:
        instance_id = data.draw(st.sampled_from(sorted(self.world.instances)))
        self.world.drain(instance_id, deadline_s)

    @rule(data=st.data())
    @precondition(lambda self: self.world.instances)
    def lose(self, data: st.DataObject) -> None:
        self.world.lose(data.draw(st.sampled_from(sorted(self.world.instances))))

    def placed(self) -> list[str]:
        return [r for r in sorted(self.world.live) if self.world.place(r) is not None]

    def not_begun(self) -> list[str]:
        """Requests that no engine has taken, as far as anybody has said."""
        world = self.world
        moving = {end.request_id for end in world.late_ends}
        unsaid = {r for i in world.instances.values() for r in i.received}
        return [
            r
            for r in sorted(world.live)
            if r not in moving and (world.place(r) is None or r in unsaid)
        ]

    def serving(self) -> list[str]:
        return [i for i in sorted(self.world.instances) if self.world.is_serving(i)]

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()
            self.world.check_determinism()
            if self.names is BUNDLES:
                assert not self.world.failures


class ChaoticMachine(SchedulerMachine):
    """The same with policies that fail all the time."""

    names = [CHAOS]  # noqa: RUF012


@pytest.mark.parametrize("machine", [SchedulerMachine, ChaoticMachine])
def test_any_stream_of_events(machine: type[SchedulerMachine]) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples(40), stateful_step_count=40)
    )
