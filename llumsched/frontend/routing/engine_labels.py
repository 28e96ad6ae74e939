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
        self._num_ever_taken = 0

    @property
    def all(self) -> list[int]:
        return list(range(self._num_labels))

    @property
    def instances(self) -> list[int]:
        """Instances that are up."""
        return list(self._labels)

    @property
    def by_instance(self) -> dict[int, int]:
        """The label of each instance that is up."""
        return dict(self._labels)

    def take(self, instance: int, label: int | None = None) -> None:
        """An instance has come.

        Args:
            label: what others call it; by default the lowest that is free.
        """
        if label is None:
            taken = set(self._labels.values())
            free = (label for label in range(self._num_labels) if label not in taken)
            label = next(free, instance % self._num_labels)
        self._labels[instance] = label
        # The lowest that was free: whatever is below has been taken before.
        self._num_ever_taken = max(self._num_ever_taken, label + 1)

    def were_used(self, num_labels: int) -> None:
        """So many have been in use, some of them before anybody here could know."""
        self._num_ever_taken = max(self._num_ever_taken, num_labels)

    @property
    def num_ever_taken(self) -> int:
        """The first so many labels are, or have been, in use."""
        return self._num_ever_taken

    def give_back(self, instance: int) -> None:
        """An instance has gone."""
        self._labels.pop(instance, None)

    def of(self, instance: int) -> int | None:
        """The label of an instance that is up."""
        return self._labels.get(instance)

    def hidden(self, *, gauges: bool) -> set[str]:
        """Labels, as metrics have them, of which gauges, or counts, are not shown."""
        shown = set(self._labels.values()) if gauges else set(range(self._num_ever_taken))
        return {str(label) for label in self.all if label not in shown}
