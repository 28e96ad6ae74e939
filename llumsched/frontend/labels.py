"""Which ``engine`` label an instance has in vLLM's metrics.

vLLM makes its metrics once, for engines it knows from the start; a pool's instances come and go.
So there is a fixed number of labels, and an instance has one of them for as long as it lives.

Invariant: no two instances that are up share a label, unless there are more of them than labels.
"""

from __future__ import annotations


class EngineLabels:
    """``num_labels`` labels, from 0 on."""

    def __init__(self, num_labels: int) -> None:
        self._num_labels = num_labels
        self._labels: dict[int, int] = {}

    @property
    def all(self) -> list[int]:
        return list(range(self._num_labels))

    @property
    def instances(self) -> list[int]:
        """Those that are up."""
        return list(self._labels)

    def take(self, instance: int) -> None:
        """An instance has come: it gets the lowest label that is free."""
        taken = set(self._labels.values())
        free = (label for label in range(self._num_labels) if label not in taken)
        self._labels[instance] = next(free, instance % self._num_labels)

    def give_back(self, instance: int) -> None:
        """An instance has gone."""
        self._labels.pop(instance, None)

    def of(self, instance: int) -> int | None:
        """The label of an instance that is up."""
        return self._labels.get(instance)
