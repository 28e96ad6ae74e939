"""Which ``engine`` label an instance has in vLLM's metrics, and which labels are shown.

vLLM makes its metrics once, for engines it knows from the start; a pool's instances come and go.
So there is a fixed number of labels, more than there are instances, and an instance has one of them
for as long as it lives. A scrape sees what there is: nothing of a label that no instance has had,
and of one whose instance has gone what it counted, but no gauge, which would go on telling how the
instance was when it died.

Invariant: no two instances that are up share a label, unless there are more of them than labels.
"""

from __future__ import annotations


class EngineLabels:
    """``num_labels`` labels, from 0 on."""

    def __init__(self, num_labels: int) -> None:
        self._num_labels = num_labels
        self._labels: dict[int, int] = {}
        self._ever_taken: set[int] = set()

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
        self._ever_taken.add(self._labels[instance])

    def give_back(self, instance: int) -> None:
        """An instance has gone."""
        self._labels.pop(instance, None)

    def of(self, instance: int) -> int | None:
        """The label of an instance that is up."""
        return self._labels.get(instance)

    def hidden(self, *, gauges: bool) -> set[str]:
        """Labels, as metrics have them, of which gauges, or counts, are not shown."""
        shown = set(self._labels.values()) if gauges else self._ever_taken
        return {str(label) for label in self.all if label not in shown}
