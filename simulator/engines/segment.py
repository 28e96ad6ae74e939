"""The segment under way: a run of steps of one batch, whose durations are an arithmetic series.

Only the end of a segment is in the heap of what is to happen, and `cut` may bring it forward; the
entry that it leaves behind is told by `due`, which is the time of the one that counts.

Invariant: a step, once begun, is not changed: a segment is cut at the end of the step under way.
This module does not know what is in the batch (`engine_batch`), nor what follows (`engine_base`).
"""

from __future__ import annotations

from heapq import heappush

from llumsched.simulator.engines.batch import DecodeBatch
from llumsched.simulator.engines.cost import series_ps, steps_until
from llumsched.simulator.kernel import STEP, Kernel


class Segment(DecodeBatch):
    """Length of a run of equal steps, and the place of a moment in it."""

    def __init__(self, index: int, kernel: Kernel, block_size: int, has_skew: bool) -> None:
        super().__init__(kernel, block_size, has_skew)
        self.index = index
        self.due = -1
        """When it ends; -1: nothing is under way."""
        self.segment_start = 0
        self.segment_steps = 0
        self.segment_decodes = False
        self.first_ps = 0
        self.first_gap_ps = 0
        """From the tokens before the first step to its own; longer where a prompt came between."""
        self.increment_ps = 0

    def cut(self, now: int) -> None:
        """End the segment with the step under way."""
        if self.segment_steps > 1:
            first, increment = self.first_ps, self.increment_ps
            k = steps_until(first, increment, now - self.segment_start)
            if k < self.segment_steps:
                self.segment_steps = k
                self.due = due = self.segment_start + series_ps(first, increment, k)
                heappush(self.kernel.heap, (due, STEP, self.index, self))

    def step_ahead(self, now: int) -> tuple[int, int]:
        """How long the step under way goes on, and how long it is; 0 and 0 if none is."""
        if self.due < 0 or not self.segment_steps:
            return 0, 0
        begun = self.steps_begun(now)
        ends = self.segment_start + series_ps(self.first_ps, self.increment_ps, begun)
        return max(0, ends - now), self.first_ps + self.increment_ps * (begun - 1)

    def progress_at(self, now: int) -> int:
        """Decode steps completed before this moment."""
        if not self.segment_decodes:
            return self.progress
        return self.progress + self.steps_begun(now) - 1

    def steps_begun(self, now: int) -> int:
        """Steps of the segment that have begun, at least 1."""
        if self.segment_steps == 1:
            return 1
        return steps_until(self.first_ps, self.increment_ps, now - self.segment_start)
