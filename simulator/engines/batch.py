"""The decodes of an engine, in closed form.

`progress` counts the decode steps of the instance. A decoding request has `progress + offset`
tokens computed, so nothing about it is touched while it decodes: when it ends, when it needs a
block and how many it holds all follow from `progress`. `growth[r]` is the number of decodes that
need a block in the step that begins at a progress of r modulo the block size; it is kept twice
over, so that any window of one block size is a slice.

Invariants: the sums are those over the requests in phase DECODING; a request has one entry in the
heap of ends that counts, and those it has left behind do not. This module does not know blocks that
are free, or time.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from heapq import heappop, heappush

from llumsched.simulator.engines.request import DECODING, LiveRequest
from llumsched.simulator.kernel import Kernel


class DecodeBatch:
    """Requests that compute one token in each decode step."""

    entry_gap_is_own = False
    """True if a request's first gap between tokens differs from that of its batch."""

    def __init__(self, kernel: Kernel, block_size: int, has_skew: bool) -> None:
        self.kernel = kernel
        self._next_number = kernel.next_number
        self.block_size = block_size
        self.has_skew = has_skew
        self.progress = 0
        self.num_decodes = 0
        self.offset_sum = 0
        self.growth = [0] * (2 * block_size)
        self.finishing: list[tuple[int, int, LiveRequest]] = []
        self.longest: list[tuple[int, int, LiveRequest]] = []
        self.joiners: list[LiveRequest] = []
        """Requests whose next gap between tokens is not that of the batch."""
        self.last_decode_end = 0
        self.own_gaps: list[int] = []
        """Gaps at the step under way of those whose gap is not that of the batch."""
        self.gap_runs = array("q")
        """All gaps between tokens: four numbers each of (first gap, what each further one adds,
        steps, tokens a step)."""
        self.gap_steps: list[int] = []
        self.gaps: list[int] = []
        """Longest gap since each of `gap_steps`: falling, the last the latest."""

    def join(self, request: LiveRequest) -> None:
        """A request whose tokens are computed decodes from the next step on."""
        progress = self.progress
        block_size = self.block_size
        request.phase = DECODING
        request.offset = offset = request.computed - progress
        request.join_step = progress
        request.finish_step = finish = progress + request.num_output - request.generated
        residue = -offset % block_size
        growth = self.growth
        growth[residue] += 1
        growth[residue + block_size] += 1
        self.offset_sum += offset
        self.num_decodes += 1
        request.entry = entry = self._next_number()
        heappush(self.finishing, (finish, entry, request))
        if self.has_skew:
            heappush(self.longest, (-offset, entry, request))
        if self.entry_gap_is_own:
            self.joiners.append(request)

    def leave(self, request: LiveRequest) -> None:
        """A request stops to decode; it knows again what it has."""
        progress = self.progress
        block_size = self.block_size
        offset = request.offset
        residue = -offset % block_size
        growth = self.growth
        growth[residue] -= 1
        growth[residue + block_size] -= 1
        self.offset_sum -= offset
        self.num_decodes -= 1
        request.entry = -1
        request.computed = computed = progress + offset
        request.num_blocks = -(-computed // block_size)
        request.generated = request.num_output - request.finish_step + progress
        join = request.join_step
        if progress > join:
            request.last_token = self.last_decode_end
            found = bisect_right(self.gap_steps, join + self.entry_gap_is_own)
            if found < len(self.gaps) and self.gaps[found] > request.itl_max:
                request.itl_max = self.gaps[found]

    def greet(self, first_end: int) -> None:
        """Let requests that have not decoded in this batch get their next token at `first_end`."""
        # Some left again before their first step: they may decode elsewhere, or be here twice.
        for request in dict.fromkeys(self.joiners):
            if (
                request.place is self
                and request.phase == DECODING
                and request.join_step == self.progress
            ):
                gap = first_end - request.last_token
                self.own_gaps.append(gap)
                if gap > request.itl_max:
                    request.itl_max = gap
                if request.inbound is not None:
                    request.downtime += gap
                    request.inbound.downtime = gap
                    request.inbound = None
        self.joiners.clear()

    def note_gap(self, step: int, gap: int) -> None:
        """Between the tokens of `step` and those before it lay `gap`."""
        gaps, steps = self.gaps, self.gap_steps
        while gaps and gaps[-1] <= gap:
            gaps.pop()
            steps.pop()
        gaps.append(gap)
        steps.append(step)

    def count_gaps(self, first_gap: int, first: int, increment: int, num_steps: int) -> None:
        """Each decode has come on by this many steps; `first_gap` lay before the first of them for
        all but those with a gap of their own."""
        b = self.num_decodes
        own = self.own_gaps
        if not own and first_gap == first:
            self.gap_runs.fromlist([first, increment, num_steps, b])
            return
        self.gap_runs.fromlist([first_gap, 0, 1, b - len(own)])
        for gap in own:
            self.gap_runs.fromlist([gap, 0, 1, 1])
        own.clear()
        if num_steps > 1:
            self.gap_runs.fromlist([first + increment, increment, num_steps - 1, b])

    def steps_to_next_end(self) -> int:
        """Steps until the first of the decodes ends."""
        finishing = self.finishing
        while finishing[0][2].entry != finishing[0][1]:
            heappop(finishing)
        return finishing[0][0] - self.progress

    def growth_of(self, num_steps: int) -> int:
        """Blocks that the decodes need for this many steps."""
        block_size = self.block_size
        start = self.progress % block_size
        if num_steps == 1:
            return self.growth[start]
        if num_steps < block_size:
            return sum(self.growth[start : start + num_steps])
        full, rest = divmod(num_steps, block_size)
        return full * self.num_decodes + sum(self.growth[start : start + rest])

    def steps_that_fit(self, most: int, num_free: int) -> int:
        """How many of `most` steps the free blocks are enough for."""
        b = self.num_decodes
        block_size = self.block_size
        if (most // block_size + 1) * b <= num_free:
            return most
        full, left = divmod(num_free, b)
        steps = full * block_size
        if steps >= most:
            return most
        start = self.progress % block_size
        for needed in self.growth[start : start + block_size]:
            left -= needed
            if left < 0:
                break
            steps += 1
        return min(steps, most)

    def num_skew_tokens(self) -> int:
        """Sum over the decodes of what they lack to the longest; the same at every progress."""
        longest = self.longest
        while longest and longest[0][2].entry != longest[0][1]:
            heappop(longest)
        return self.num_decodes * -longest[0][0] - self.offset_sum if longest else 0
