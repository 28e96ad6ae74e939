"""The instances that have registered with the scheduler: how to reach them, and their last word."""

from __future__ import annotations

import math
from collections.abc import Mapping

from llumsched.core.load import InstanceLoad
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.wire.control import InstanceDescription, RegisterInstance, ReportLoad


class InstanceRegistry:
    """Invariant: an instance is here from its registration until it is forgotten.

    By instance id, ``identities`` are those of their connections, ``unproven`` counts the
    connections to them that did not hold the pool's keys.
    """

    def __init__(self) -> None:
        self._registered: dict[str, RegisterInstance] = {}
        self._loads: dict[str, InstanceLoad] = {}
        self._load_times_s: dict[str, float] = {}
        self.identities: dict[str, bytes] = {}
        self.unproven: dict[str, int] = {}

    @property
    def loads(self) -> Mapping[str, InstanceLoad]:
        """The last load report of each instance, by its id."""
        return self._loads

    def __contains__(self, instance_id: str) -> bool:
        return instance_id in self._registered

    def __getitem__(self, instance_id: str) -> RegisterInstance:
        return self._registered[instance_id]

    def get(self, instance_id: str) -> RegisterInstance | None:
        return self._registered.get(instance_id)

    def register(self, identity: bytes, message: RegisterInstance) -> None:
        """An instance is there, or there again."""
        self._registered[message.spec.instance_id] = message
        self.identities[message.spec.instance_id] = identity

    def report(self, message: ReportLoad, now_s: float) -> None:
        """The latest load of an instance."""
        load = message.load
        self.unproven[load.instance_id] = message.num_unauthenticated
        self._loads[load.instance_id] = load
        self._load_times_s[load.instance_id] = now_s

    def forget(self, instance_id: str) -> None:
        """An instance is gone."""
        self._registered.pop(instance_id, None)
        self.identities.pop(instance_id, None)
        self.unproven.pop(instance_id, None)
        self._loads.pop(instance_id, None)
        self._load_times_s.pop(instance_id, None)

    def describe(self, cluster: ClusterSnapshot) -> list[InstanceDescription]:
        """Every instance, by id. Infinite freeness has no number in JSON."""
        views = {view.instance_id: view for view in cluster}
        described = []
        for instance_id in sorted(self._registered):
            view = views.get(instance_id)
            reported_s = self._load_times_s.get(instance_id)
            freeness = view.freeness if view is not None else None
            described.append(
                InstanceDescription(
                    instance_id=instance_id,
                    state=view.state.value if view is not None else "booting",
                    role=self._registered[instance_id].spec.role.value,
                    freeness=freeness if freeness is None or math.isfinite(freeness) else None,
                    report_age_s=cluster.now - reported_s if reported_s is not None else None,
                    load=self._loads.get(instance_id),
                    cannot_migrate=self._registered[instance_id].cannot_migrate,
                )
            )
        return described
