"""An engine model: requests in a batch, blocks in a cache, and steps in closed form.

`progress` counts the decode steps of the instance. A decoding request has `progress + offset`
tokens computed, so nothing about it is touched while it decodes: when it ends, when it needs a
block and how many it holds all follow from `progress`. `growth[r]` is the number of decodes that
need a block in the step that begins at a progress of r modulo the block size.

A *segment* is a run of steps with one batch. It ends where something may change: a request ends,
blocks run out, or somebody asked (`cut`). Only the end of a segment is an event.

Invariants: `num_used + num_reserved`, with what the steps begun so far have grown by, never exceeds
`num_blocks`; a step, once begun, is not changed. Which requests make up a step is decided by the
engine's version (`engine_v1`, `engine_v01`). This module does not know the scheduler.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from heapq import heappop, heappush
from typing import Protocol

from llumsched.simulator.cost import StepCost, series_ps, steps_until
from llumsched.simulator.engine_request import LiveRequest, Phase
from llumsched.simulator.kernel import STEP, Kernel
from llumsched.simulator.kv_cache import PrefixCache

WAITING = int(Phase.WAITING)
PREFILLING = int(Phase.PREFILLING)
DECODING = int(Phase.DECODING)
SUSPENDED = int(Phase.SUSPENDED)
HOLDING = int(Phase.HOLDING)
ENDED = int(Phase.ENDED)
AWAY = int(Phase.AWAY)


class EngineHost(Protocol):
    """Whom an engine tells what happened, at the end of the step in which it did."""

    def finished(self, engine: Engine, request: LiveRequest, now: int) -> None: ...

    def suspended(self, engine: Engine, request: LiveRequest, now: int) -> None: ...

    def preempted(self, engine: Engine, request: LiveRequest, now: int) -> None: ...


class Engine:
    """One instance's engine; a version says in `_schedule` what the next segment is."""

    entry_gap_is_own = False
    """Whether a request's first gap between tokens differs from that of its batch."""

    __slots__ = (
        "block_size",
        "cache",
        "cost",
        "cost_copying",
        "due",
        "finished_ids",
        "finishing",
        "first_ps",
        "gap_steps",
        "gaps",
        "growth",
        "holding",
        "host",
        "increment_ps",
        "index",
        "instance_id",
        "is_alive",
        "is_blocked",
        "joiners",
        "kernel",
        "last_decode_end",
        "longest",
        "max_batched_tokens",
        "max_num_seqs",
        "most_kv_tokens",
        "most_requests",
        "most_tokens",
        "num_blocks",
        "num_copies",
        "num_decodes",
        "num_high_running",
        "num_reserved",
        "num_steps",
        "num_used",
        "num_waiting_blocks",
        "num_waiting_tokens",
        "offset_sum",
        "prefills",
        "progress",
        "received_ids",
        "running",
        "segment_decodes",
        "segment_start",
        "segment_steps",
        "step_by_step",
        "step_time_ps",
        "suspending",
        "waiting",
        "watermark_blocks",
    )

    def __init__(
        self,
        *,
        index: int,
        instance_id: str,
        host: EngineHost,
        kernel: Kernel,
        cost: StepCost,
        cost_copying: StepCost,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_batched_tokens: int,
        watermark_blocks: int,
        cache: PrefixCache | None,
        step_by_step: bool,
    ) -> None:
        self.index = index
        self.instance_id = instance_id
        self.host = host
        self.kernel = kernel
        self.cost = cost
        self.cost_copying = cost_copying
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.watermark_blocks = watermark_blocks
        self.cache = cache
        self.step_by_step = step_by_step
        self.is_alive = True
        # Requests.
        self.waiting: deque[LiveRequest] = deque()
        self.holding: deque[LiveRequest] = deque()
        self.running: dict[LiveRequest, None] = {}
        self.suspending: list[LiveRequest] = []
        self.num_waiting_blocks = 0
        self.num_waiting_tokens = 0
        self.num_high_running = 0
        self.is_blocked = False
        # Blocks.
        self.num_used = 0
        self.num_reserved = 0
        # Decodes.
        self.progress = 0
        self.num_decodes = 0
        self.offset_sum = 0
        self.growth = [0] * (2 * block_size)
        self.finishing: list[tuple[int, int, LiveRequest]] = []
        self.longest: list[tuple[int, int, LiveRequest]] = []
        self.joiners: list[LiveRequest] = []
        self.last_decode_end = 0
        self.gap_steps: list[int] = []
        self.gaps: list[int] = []
        # The segment under way.
        self.due = -1
        self.segment_start = 0
        self.segment_steps = 0
        self.segment_decodes = False
        self.first_ps = 0
        self.increment_ps = 0
        self.prefills: list[tuple[LiveRequest, int]] = []
        self.num_copies = 0
        # What reports and results want.
        self.num_steps = 0
        self.step_time_ps = 0
        self.most_tokens = 0
        self.most_requests = 0
        self.most_kv_tokens = 0
        self.received_ids: list[str] = []
        self.finished_ids: list[str] = []

    def __lt__(self, other: Engine) -> bool:
        """Entries of one engine at one instant are equal to the heap."""
        return self.index < other.index

    # What the next segment is.

    def _schedule(self, now: int) -> None:
        """Decide the next segment, which begins now, or stay idle."""
        raise NotImplementedError

    # From outside, between two steps or in the middle of one.

    def add(self, request: LiveRequest, now: int) -> None:
        """Take in a request that holds no KV here; it goes to the end of the queue."""
        request.place = self
        self.received_ids.append(request.request_id)
        self._enqueue(request)
        if self.due < 0:
            self._wake(now)
        elif len(self.waiting) == 1:
            self.cut(now)

    def cut(self, now: int) -> None:
        """End the segment with the step under way."""
        if self.segment_steps > 1:
            first, increment = self.first_ps, self.increment_ps
            k = steps_until(first, increment, now - self.segment_start)
            if k < self.segment_steps:
                self.segment_steps = k
                self.due = due = self.segment_start + series_ps(first, increment, k)
                heappush(self.kernel.heap, (due, STEP, self.index, self))

    def freed(self, now: int) -> None:
        """Blocks came free in the middle of a segment: what is blocked may go on."""
        if self.due < 0:
            self._wake(now)
        elif self.is_blocked:
            self.cut(now)

    def suspend(self, request: LiveRequest, now: int) -> None:
        """Take a decoding request out of the batch once the step under way has ended."""
        self.suspending.append(request)
        self.cut(now)

    def resume(self, request: LiveRequest, now: int) -> None:
        """Let a request that holds its KV here into the batch again, or for the first time."""
        request.place = self
        request.phase = HOLDING
        self.holding.append(request)
        if self.due < 0:
            self._wake(now)
        else:
            self.cut(now)

    def reserve(self, num_blocks: int, now: int) -> bool:
        """Set blocks aside; False if there are not that many."""
        if num_blocks > self.num_free_at(now):
            return False
        self.num_reserved += num_blocks
        if self.segment_steps > 1:
            free = self.num_blocks - self.num_used - self.num_reserved
            if self._growth_of(self.segment_steps) >= free:
                self.cut(now)
        return True

    def unreserve(self, num_blocks: int, now: int) -> None:
        """Give blocks that were set aside back."""
        self.num_reserved -= num_blocks
        self.freed(now)

    def set_copying(self, by: int, now: int) -> None:
        """A copy of KV begins (1) or ends (-1): steps take longer while one runs."""
        was = self.num_copies > 0
        self.num_copies += by
        if was != (self.num_copies > 0):
            self.cut(now)

    def release(self, num_blocks: int, held: list[int], now: int) -> None:
        """Free what a suspended request that has moved away left here."""
        self.num_used -= num_blocks
        if held:
            assert self.cache is not None
            self.num_used += len(held) - self.cache.release(held)
        self.freed(now)

    def die(self, now: int) -> None:
        """Stop in the middle of a step; tokens of the steps before it have been delivered."""
        self.is_alive = False
        self.prefills = []
        num_done = self._steps_begun(now) - 1 if self.segment_decodes else 0
        if num_done > 0:
            self.segment_steps = num_done
            self._complete(
                self.segment_start + series_ps(self.first_ps, self.increment_ps, num_done)
            )
        for request in list(self.running):
            if request.phase == DECODING:
                self._leave(request, now)
        self.due = -1

    def num_free_at(self, now: int) -> int:
        """Blocks free at this moment, which the step under way no longer needs."""
        free = self.num_blocks - self.num_used - self.num_reserved
        if self.segment_decodes:
            free -= self._growth_of(self._steps_begun(now))
        return free

    def progress_at(self, now: int) -> int:
        """Decode steps completed before this moment."""
        if not self.segment_decodes:
            return self.progress
        return self.progress + self._steps_begun(now) - 1

    def step_time_at(self, now: int) -> int:
        """Duration of the latest step that computed no prompt, the one under way included."""
        if self.segment_steps > 1:
            return self.step_time_ps + self.increment_ps * (self._steps_begun(now) - 1)
        return self.step_time_ps

    def _steps_begun(self, now: int) -> int:
        if self.segment_steps == 1:
            return 1
        return steps_until(self.first_ps, self.increment_ps, now - self.segment_start)

    def _wake(self, now: int) -> None:
        """Begin a step at the end of this instant, when all that comes in it has come."""
        self.due = now
        heappush(self.kernel.heap, (now, STEP, self.index, self))

    # A segment ends.

    def end_of_segment(self, now: int) -> None:
        """Its last step has ended: tokens come out, requests end, the next segment begins."""
        self.due = -1
        self._complete(now)
        if self.suspending:
            self._suspend_now(now)
        self._schedule(now)
        if self.cache is not None:
            self.cache.shrink(self.num_blocks - self.num_used - self.num_reserved)

    def _complete(self, now: int) -> None:
        k = self.segment_steps
        self.num_steps += k
        self.segment_steps = 0
        if self.segment_decodes:
            self.segment_decodes = False
            self.num_used += self._growth_of(k)
            if self.cache is not None:
                # Before anything is freed: what the steps grew by was taken when they began.
                self.cache.shrink(self.num_blocks - self.num_used - self.num_reserved)
            self.progress = progress = self.progress + k
            self.last_decode_end = now
            last_ps = self.first_ps + self.increment_ps * (k - 1)
            self._note_gap(progress, last_ps)
            if not self.prefills:
                self.step_time_ps = last_ps
            finishing = self.finishing
            while finishing and finishing[0][0] <= progress:
                _, entry, request = heappop(finishing)
                if request.entry == entry:
                    self._finish_decode(request, now)
        if self.prefills:
            prefills, self.prefills = self.prefills, []
            for request, num_tokens in prefills:
                request.computed += num_tokens
                if request.computed == request.target:
                    self._prefilled(request, now)

    def _prefilled(self, request: LiveRequest, now: int) -> None:
        """The last token of a prompt was computed: it yields a token of output."""
        request.generated += 1
        if request.first_token < 0:
            request.first_token = now
        else:
            # It was evicted; the tokens before that are there already.
            request.itl_max = max(request.itl_max, now - request.last_token)
            request.loss += max(0, now - request.killed - self.step_time_ps)
        request.last_token = now
        if request.generated >= request.num_output:
            del self.running[request]
            self.num_high_running -= request.execution_priority > 0
            self.free(request)
            self._end(request, now)
        else:
            self._join(request)

    def _finish_decode(self, request: LiveRequest, now: int) -> None:
        self._leave(request, now)
        del self.running[request]
        self.num_high_running -= request.execution_priority > 0
        self.free(request)
        self._end(request, now)

    def _end(self, request: LiveRequest, now: int) -> None:
        request.phase = ENDED
        self.finished_ids.append(request.request_id)
        self.host.finished(self, request, now)

    def _suspend_now(self, now: int) -> None:
        suspending, self.suspending = self.suspending, []
        for request in suspending:
            if request.phase == DECODING and request.place is self:
                self._leave(request, now)
                del self.running[request]
                self.num_high_running -= request.execution_priority > 0
                request.phase = SUSPENDED
                self.host.suspended(self, request, now)

    # The batch.

    def _begin(self, now: int, first: int, increment: int, num_steps: int, decodes: bool) -> None:
        """Start a segment."""
        if self.step_by_step:
            num_steps = 1
        if decodes:
            if self.joiners:
                self._greet(now + first)
            if not self.prefills:
                self.step_time_ps = first
        self.segment_start = now
        self.segment_steps = num_steps
        self.segment_decodes = decodes
        self.first_ps = first
        self.increment_ps = increment
        self.due = due = now + num_steps * first + increment * (num_steps * (num_steps - 1) // 2)
        heappush(self.kernel.heap, (due, STEP, self.index, self))

    def _decode_series(self) -> tuple[int, int]:
        """Duration of the next decode step, and what each further one adds."""
        cost = self.cost_copying if self.num_copies else self.cost
        b = self.num_decodes
        num_kv_tokens = b * self.progress + self.offset_sum
        if num_kv_tokens > self.most_kv_tokens:
            self.most_kv_tokens = num_kv_tokens
        if b > self.most_requests:
            self.most_requests = b
        first = cost.base[b] + cost.request * b + cost.kv_token * num_kv_tokens
        if cost.skew_token:
            first += cost.skew_token * self._num_skew_tokens()
        return first, cost.kv_token * b

    def _num_skew_tokens(self) -> int:
        """Sum over the decodes of what they lack to the longest; the same at every progress."""
        longest = self.longest
        while longest and longest[0][2].entry != longest[0][1]:
            heappop(longest)
        return self.num_decodes * -longest[0][0] - self.offset_sum if longest else 0

    def _join(self, request: LiveRequest) -> None:
        """A request whose tokens are computed decodes from the next step on."""
        progress = self.progress
        block_size = self.block_size
        offset = request.computed - progress
        request.phase = DECODING
        request.offset = offset
        request.join_step = progress
        request.finish_step = finish = progress + request.num_output - request.generated
        residue = -offset % block_size
        growth = self.growth
        growth[residue] += 1
        growth[residue + block_size] += 1
        self.offset_sum += offset
        self.num_decodes += 1
        request.entry = entry = self.kernel.next_number()
        heappush(self.finishing, (finish, entry, request))
        if self.cost.skew_token:
            heappush(self.longest, (-offset, entry, request))
        if self.entry_gap_is_own:
            self.joiners.append(request)

    def _leave(self, request: LiveRequest, now: int) -> None:
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

    def _greet(self, first_end: int) -> None:
        """Those who have not decoded in this batch yet get their next token at `first_end`."""
        for request in self.joiners:
            if request.phase == DECODING and request.join_step == self.progress:
                gap = first_end - request.last_token
                if gap > request.itl_max:
                    request.itl_max = gap
                if request.inbound is not None:
                    request.downtime += gap
                    request.inbound.downtime = gap
                    request.inbound = None
        self.joiners.clear()

    def _note_gap(self, step: int, gap: int) -> None:
        """Keep the longest gap between tokens since every earlier step."""
        gaps, steps = self.gaps, self.gap_steps
        while gaps and gaps[-1] <= gap:
            gaps.pop()
            steps.pop()
        gaps.append(gap)
        steps.append(step)

    def _steps_to_next_end(self) -> int:
        """Steps until the first of the decodes ends."""
        finishing = self.finishing
        while finishing[0][2].entry != finishing[0][1]:
            heappop(finishing)
        return finishing[0][0] - self.progress

    # Blocks.

    def _growth_of(self, num_steps: int) -> int:
        """Blocks that the decodes need for this many steps."""
        full, rest = divmod(num_steps, self.block_size)
        start = self.progress % self.block_size
        return full * self.num_decodes + sum(self.growth[start : start + rest])

    def _steps_that_fit(self, most: int, num_free: int) -> int:
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

    def free(self, request: LiveRequest) -> None:
        """Give back the blocks of a request that does not decode."""
        num_blocks = request.num_blocks
        if request.held:
            assert self.cache is not None
            num_blocks += self.cache.release(request.held) - len(request.held)
            request.held = []
        self.num_used -= num_blocks
        request.num_blocks = 0

    # The queue.

    def _enqueue(self, request: LiveRequest, *, in_front: bool = False) -> None:
        request.phase = WAITING
        request.computed = 0
        request.target = request.num_prompt + request.generated
        self.num_waiting_tokens += request.target
        self.num_waiting_blocks += -(-request.target // self.block_size)
        if in_front:
            self.waiting.appendleft(request)
        else:
            self.waiting.append(request)

    def _dequeue(self, now: int) -> LiveRequest:
        """The head of the queue begins to run."""
        request = self.waiting.popleft()
        self.num_waiting_tokens -= request.target
        self.num_waiting_blocks -= -(-request.target // self.block_size)
        request.phase = PREFILLING
        self.running[request] = None
        self.num_high_running += request.execution_priority > 0
        if request.scheduled < 0:
            request.scheduled = now
        return request

    def _take_holding(self, request: LiveRequest) -> None:
        """A request that holds its KV here joins the batch."""
        self.running[request] = None
        self.num_high_running += request.execution_priority > 0
        self._join(request)
        if not self.entry_gap_is_own:
            self.joiners.append(request)

    def _preempt(self, request: LiveRequest, now: int) -> None:
        """Evict a request: its KV is dropped, it waits at the front and will be recomputed."""
        del self.running[request]
        self.num_high_running -= request.execution_priority > 0
        if request.phase == DECODING:
            self._leave(request, now)
        self.free(request)
        request.num_preemptions += 1
        request.killed = now
        self._enqueue(request, in_front=True)
        self.host.preempted(self, request, now)
