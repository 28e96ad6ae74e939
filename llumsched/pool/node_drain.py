"""Machines of the Ray cluster that are about to go: their instances are told so in time.

Ray calls such a machine draining: an autoscaler takes it away, or a cloud takes back what it lent,
or an operator has said ``ray drain-node``. Ray places nothing there any more and waits, until what
runs there has ended or a deadline has passed. Each instance there is told once, when it serves, and
is drained as after a SIGTERM. What has not left at the deadline dies, and goes on elsewhere as what
dies does. This module does not know how an instance is drained.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

import ray

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0


class PlacedInstance(Protocol):
    """An instance, and Ray's id of its machine, once that is known."""

    instance_id: str
    node_id: str | None

    @property
    def serves(self) -> bool: ...

    def leave(self) -> None:
        """Tell it that its machine goes."""


def draining_nodes() -> Collection[str]:
    """The machines that are about to go, by Ray's ids of them."""
    found: Collection[str] = ray._private.state.state.get_draining_nodes()
    return found


class DrainingMachines:
    """Args:
    instances: those of the pool, at the moment.
    find: as ``draining_nodes``.
    """

    def __init__(
        self,
        instances: Callable[[], Iterable[PlacedInstance]],
        find: Callable[[], Collection[str]] = draining_nodes,
    ) -> None:
        self._instances = instances
        self._find = find
        self._told: set[str] = set()

    def tick(self) -> None:
        """Look once, and tell those that do not know yet."""
        draining = self._find()
        instances = list(self._instances())
        self._told &= {instance.instance_id for instance in instances}
        for instance in instances:
            goes = instance.node_id in draining and instance.serves
            if goes and instance.instance_id not in self._told:
                self._told.add(instance.instance_id)
                logger.warning("The machine of %s goes, so it is drained", instance.instance_id)
                instance.leave()
