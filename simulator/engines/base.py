"""An engine model: a queue, a batch, blocks in a cache, and steps in runs.

A *segment* is a run of steps with one batch. It ends where something may change: a request ends,
blocks run out, or somebody asked (`cut`). Only the end of a segment is an event.

Invariants: `num_used + num_reserved`, with what the steps begun so far have grown by, never exceeds
`num_blocks`; a step, once begun, is not changed. Which requests make up a step is decided by the
engine's version (`engine_v1`, `engine_v01`). This module does not know the scheduler.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

from llumsched.core.step_time import MeasuredStep
from llumsched.simulator.engines.cost import CostModel, series_ps, steps_until
from llumsched.simulator.engines.host import EngineHost
from llumsched.simulator.engines.kv_cache import PrefixCache
from llumsched.simulator.engines.machine import DECODES, IDLE, PROMPTS, Costs, Machine
from llumsched.simulator.engines.request import (
    DECODING,
    ENDED,
    HOLDING,
    PREFILLING,
    SUSPENDED,
    WAITING,
    LiveRequest,
)
from llumsched.simulator.engines.segment import Segment
from llumsched.simulator.kernel import PS_PER_S, STEP, Kernel


class Engine(Segment, ABC):
    """One instance's engine; a version says in `_schedule` what the next segment is."""

    def __init__(
        self,
        *,
        index: int,
        instance_id: str,
        host: EngineHost,
        kernel: Kernel,
        costs: Costs,
        costs_copying: Costs,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_batched_tokens: int,
        watermark_blocks: int,
        cache: PrefixCache | None,
        step_by_step: bool,
        measures_steps: bool = False,
    ) -> None:
        super().__init__(index, kernel, block_size, has_skew=costs.decodes.skew_token > 0)
        self.instance_id = instance_id
        self.host = host
        self.costs = costs
        self.costs_copying = costs_copying
        self.num_blocks = num_blocks
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.watermark_blocks = watermark_blocks
        self.cache = cache
        self.step_by_step = step_by_step
        self.measures_steps = measures_steps
        """True if a report is to tell of a step with its batch."""
        self.is_alive = True
        self.machine: Machine | None = None
        """Set where others compute on the same machine, and slow this one down."""
        self.doing = IDLE
        """As `machine` was told."""
        # Requests.
        self.waiting: deque[LiveRequest] = deque()
        self.holding: deque[LiveRequest] = deque()
        self.running: dict[LiveRequest, None] = {}
        self.suspending: list[LiveRequest] = []
        self.num_waiting_blocks = 0
        self.num_waiting_tokens = 0
        self.num_waiting_pairs = 0
        """Pairs of prompt tokens that the queue will compute, without what a cache may hold."""
        self.num_high_running = 0
        self.is_blocked = False
        # Blocks.
        self.num_used = 0
        self.num_reserved = 0
        self.prefills: list[tuple[LiveRequest, int]] = []
        self.num_copies = 0
        # What reports and results want.
        self.num_reports = self.last_report = self.report_due = self.next_victim = 0
        self.reported_free_blocks = num_blocks
        self.reported_waiting = False
        self.victim_blocks: int | None = None
        self.may_have_changed = False
        """Somebody came into or left queue or batch, since it was last looked at."""
        self.num_steps = 0
        self.step_time_ps = 0
        self.begun_prompt_step: MeasuredStep | None = None
        self.prompt_step: MeasuredStep | None = None
        """The last step that computed prompts and has ended, until a report tells of it."""
        self.most_tokens = self.most_requests = self.most_kv_tokens = 0
        self.told_progress: dict[LiveRequest, int] = {}
        """Output tokens less decode steps of those that run, as a report told them last."""
        self.received_ids: list[str] = []
        self.finished_ids: list[str] = []

    def __lt__(self, other: Engine) -> bool:
        """Entries of one engine at one instant are equal to the heap."""
        return self.index < other.index

    # What the next segment is.

    @abstractmethod
    def _schedule(self, now: int) -> None:
        """Decide the next segment, which begins now, or stay idle."""

    # From outside, between two steps or in the middle of one.

    def add(self, request: LiveRequest, now: int) -> None:
        """Take in a request that holds no KV here; it goes to the end of the queue."""
        request.place = self
        self.received_ids.append(request.request_id)
        self._enqueue(request)
        if self.due < 0:
            self.may_have_changed = True
            self._wake(now)
        elif len(self.waiting) == 1:
            self.may_have_changed = True
            if self.segment_steps > 1:
                self.cut(now)

    def take_back(self, request: LiveRequest, now: int) -> None:
        """Let a request that waits go, as if it had never come; what waits behind it moves up."""
        self.waiting.remove(request)
        self.num_waiting_tokens -= request.target
        self.num_waiting_pairs -= request.target * request.target // 2
        self.num_waiting_blocks -= -(-request.target // self.block_size)
        request.place = None
        self.may_have_changed = True
        self.freed(now)

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
            if self.growth_of(self.segment_steps) >= free:
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

    def set_costs(self, costs: Costs, costs_copying: Costs, now: int) -> None:
        """From the next step on, steps cost this."""
        if costs is not self.costs:
            self.costs, self.costs_copying = costs, costs_copying
            self.cut(now)

    def release(self, num_blocks: int, held: Sequence[int], now: int) -> None:
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
        num_done = self.steps_begun(now) - 1 if self.segment_decodes else 0
        if num_done > 0:
            self.segment_steps = num_done
            self._complete(
                self.segment_start + series_ps(self.first_ps, self.increment_ps, num_done)
            )
        # Nothing is under way any more that a late message could `cut`.
        self.segment_steps = 0
        self.segment_decodes = False
        for request in list(self.running):
            if request.phase == DECODING:
                self.leave(request)
        self.due = -1
        if self.machine is not None:
            self._tell_machine(self.machine, now)

    def num_free_at(self, now: int) -> int:
        """Blocks free at this moment, which the step under way no longer needs."""
        free = self.num_blocks - self.num_used - self.num_reserved
        if self.segment_decodes:
            free -= self.growth_of(self.steps_begun(now))
        return free

    def free_and_step_time_at(self, now: int) -> tuple[int, int]:
        """`num_free_at`, and the duration of the latest step that computed no prompt, the one under
        way included; for reports, which want both."""
        free = self.num_blocks - self.num_used - self.num_reserved
        if not self.segment_decodes:
            return free, self.step_time_ps
        if self.segment_steps == 1:
            return free - self.growth[self.progress % self.block_size], self.step_time_ps
        begun = steps_until(self.first_ps, self.increment_ps, now - self.segment_start)
        step_ps = self.step_time_ps + self.increment_ps * (begun - 1)
        return free - self.growth_of(begun), step_ps

    def _wake(self, now: int) -> None:
        """Begin a step at the end of this instant, when all that comes in it has come."""
        if self.is_alive:
            self.due = now
            heappush(self.kernel.heap, (now, STEP, self.index, self))

    def take_step(self, now: int) -> MeasuredStep | None:
        """A step since the last report: one with prompts, or the decodes under way."""
        step, self.prompt_step = self.prompt_step, None
        if step is not None or not self.segment_decodes or self.prefills:
            return step
        num_before = self.steps_begun(now) - 1
        b = self.num_decodes
        return MeasuredStep(
            num_prefill_tokens=0,
            num_pairs=0,
            num_decodes=b,
            num_kv_tokens=b * (self.progress + num_before) + self.offset_sum,
            num_skew_tokens=0,
            seconds=(self.first_ps + self.increment_ps * num_before) / PS_PER_S,
        )

    def progress_at(self, now: int) -> int:
        """Decode steps that have ended by now."""
        if not self.segment_decodes or self.segment_steps == 1:
            return self.progress
        return self.progress + self.steps_begun(now) - 1

    def take_progress(self, now: int) -> Iterator[tuple[str, int, int]]:
        """(id, tokens computed, output tokens) of those that run, of whom these do not follow from
        what was told before and the decode steps since, and of those that were evicted."""
        steps = self.progress_at(now)
        before, self.told_progress = self.told_progress, {}
        for request in self.running:
            if request.phase == DECODING:
                computed = steps + request.offset
                outputs = request.num_output - request.finish_step + steps
                lag = outputs - steps
            else:
                computed, outputs = request.computed, request.generated
                lag = -computed - 1
            self.told_progress[request] = lag
            if before.pop(request, None) != lag:
                yield request.request_id, computed, outputs
        for request in before:
            if request.place is self and request.phase == WAITING:
                yield request.request_id, 0, request.generated

    # A segment ends.

    def end_of_segment(self, now: int) -> None:
        """End a segment at its last step: tokens come out, requests end, the next one begins."""
        self.due = -1
        self._complete(now)
        if self.suspending:
            self._suspend_now(now)
        self._schedule(now)
        num_free = self.num_blocks - self.num_used - self.num_reserved
        if self.cache is not None:
            self.cache.shrink(num_free)
        if self.may_have_changed:
            self.may_have_changed = False
            self.host.load_changed(self, num_free, now)
        if self.machine is not None:
            self._tell_machine(self.machine, now)

    def _tell_machine(self, machine: Machine, now: int) -> None:
        doing = IDLE if self.due < 0 else PROMPTS if self.prefills else DECODES
        if doing != self.doing:
            self.doing = doing
            machine.changed(now)

    def _complete(self, now: int) -> None:
        k = self.segment_steps
        self.num_steps += k
        self.segment_steps = 0
        prefills = self.prefills
        if self.segment_decodes:
            self.segment_decodes = False
            b = self.num_decodes
            self.num_used += self.growth_of(k)
            if self.cache is not None:
                # Before anything is freed: what the steps grew by was taken when they began.
                self.cache.shrink(self.num_blocks - self.num_used - self.num_reserved)
            self.progress = progress = self.progress + k
            self.last_decode_end = now
            last_ps = self.first_ps
            if k > 1:
                last_ps += self.increment_ps * (k - 1)
            self.note_gap(progress, last_ps)
            self.count_gaps(self.first_gap_ps, self.first_ps, self.increment_ps, k)
            if not prefills:
                self.step_time_ps = last_ps
            if b > self.most_requests:
                self.most_requests = b
            num_kv_tokens = b * (progress - 1) + self.offset_sum
            if num_kv_tokens > self.most_kv_tokens:
                self.most_kv_tokens = num_kv_tokens
            finishing = self.finishing
            while finishing and finishing[0][0] <= progress:
                _, entry, request = heappop(finishing)
                if request.entry == entry:
                    self.leave(request)
                    self._end(request, now)
        if prefills:
            self.prefills = []
            self.prompt_step = self.begun_prompt_step
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
            gap = now - request.last_token
            request.itl_max = max(request.itl_max, gap)
            self.gap_runs.extend((gap, 0, 1, 1))
        if request.killed >= 0:
            request.loss += max(0, now - request.killed - self.step_time_ps)
            request.killed = -1
        request.last_token = now
        if request.generated >= request.num_output:
            self._end(request, now)
        else:
            self.join(request)

    def _end(self, request: LiveRequest, now: int) -> None:
        """End a request whose last token has come."""
        del self.running[request]
        self.num_high_running -= request.execution_priority > 0
        self.free(request)
        request.phase = ENDED
        self.may_have_changed = True
        self.finished_ids.append(request.request_id)
        self.host.finished(self, request, now)

    def _suspend_now(self, now: int) -> None:
        suspending, self.suspending = self.suspending, []
        for request in suspending:
            if request.phase == DECODING and request.place is self:
                self.leave(request)
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
                self.greet(now + first)
            if not self.prefills:
                self.step_time_ps = first
        self.segment_start = now
        self.segment_steps = num_steps
        self.segment_decodes = decodes
        self.first_ps = self.first_gap_ps = first
        self.increment_ps = increment
        due = now + first
        if num_steps > 1:
            due = now + series_ps(first, increment, num_steps)
        self.due = due
        heappush(self.kernel.heap, (due, STEP, self.index, self))

    def _decode_series(self, cost: CostModel) -> tuple[int, int]:
        """Duration of the next decode step, and what each further one adds."""
        b = self.num_decodes
        num_kv_tokens = b * self.progress + self.offset_sum
        first = cost.base[b] + cost.request * b + cost.kv_token * num_kv_tokens
        if self.has_skew:
            first += cost.skew_token * self.num_skew_tokens()
        return first, cost.kv_token * b

    # Blocks.

    def free(self, request: LiveRequest) -> None:
        """Give back the blocks of a request that does not decode."""
        num_blocks = request.num_blocks
        if request.held:
            assert self.cache is not None
            num_blocks += self.cache.release(request.held) - len(request.held)
            request.held = ()
        self.num_used -= num_blocks
        request.num_blocks = 0

    # The queue.

    def _enqueue(self, request: LiveRequest, *, in_front: bool = False) -> None:
        request.phase = WAITING
        request.computed = 0
        request.target = request.num_prompt + request.generated
        self.num_waiting_tokens += request.target
        self.num_waiting_pairs += request.target * request.target // 2
        self.num_waiting_blocks += -(-request.target // self.block_size)
        if in_front:
            self.waiting.appendleft(request)
        else:
            self.waiting.append(request)

    def _dequeue(self, now: int) -> LiveRequest:
        """The head of the queue begins to run."""
        request = self.waiting.popleft()
        self.num_waiting_tokens -= request.target
        self.num_waiting_pairs -= request.target * request.target // 2
        self.num_waiting_blocks -= -(-request.target // self.block_size)
        request.phase = PREFILLING
        self.may_have_changed = True
        self.running[request] = None
        self.num_high_running += request.execution_priority > 0
        if request.scheduled < 0:
            request.scheduled = now
        return request

    def _take_holding(self, request: LiveRequest) -> None:
        """A request that holds its KV here joins the batch."""
        self.running[request] = None
        self.num_high_running += request.execution_priority > 0
        self.join(request)
        if not self.entry_gap_is_own:
            self.joiners.append(request)

    def _preempt(self, request: LiveRequest, now: int) -> None:
        """Evict a request: its KV is dropped, it waits at the front and will be recomputed."""
        del self.running[request]
        self.num_high_running -= request.execution_priority > 0
        if request.phase == DECODING:
            self.leave(request)
        self.free(request)
        self.may_have_changed = True
        request.num_preemptions += 1
        request.killed = now
        self._enqueue(request, in_front=True)
        self.host.preempted(self, request, now)
