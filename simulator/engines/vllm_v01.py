"""vLLM 0.1.x, the engine of the Llumnix paper: prompts first, and whole.

A step either computes prompts or decodes. While the head of the queue fits (its blocks above a
watermark, its tokens into the batch), whole prompts are batched up to the token limit and every
decode waits; the first that does not fit holds back all behind it. A decode step needs one free
block for each request in turn, whether it takes it or not; short of that, the request that arrived
last is evicted, requeued at the front, and later recomputed, prompt and output together.

Departure: a request that comes by a migration joins the next decode step that has a place; the
paper's engine was changed in a like way. Not modelled: swapping, beam search.
"""

from __future__ import annotations

from llumsched.simulator.engines.base import Engine
from llumsched.simulator.engines.request import LiveRequest


class EngineV01(Engine):
    """See the module docstring."""

    entry_gap_is_own = True

    def _schedule(self, now: int) -> None:
        self.is_blocked = False
        if self.waiting:
            self._batch_prompts(now)
            if self.prefills:
                self._begin_prefill(now)
                return
        while self.holding and len(self.running) < self.max_num_seqs:
            self._take_holding(self.holding.popleft())
        has_evicted = False
        while self.num_decodes and not self._fits_one_step():
            self._preempt(max(self.running, key=_arrived_last), now)
            has_evicted = True
        if not self.num_decodes:
            if has_evicted:
                # All of them wait now, with every block free.
                self._schedule(now)
            return
        costs = self.costs_copying if self.num_copies else self.costs
        first, increment = self._decode_series(costs.decodes)
        first_gap = max(first, now + first - self.last_decode_end)
        if first_gap > first:
            # Prompts came between: those who decoded before them waited for both.
            self.note_gap(self.progress + 1, first_gap)
        num_steps = 1
        if not has_evicted:
            num_free = self.num_blocks - self.num_used - self.num_reserved
            # One block less, for the request in turn; a step that takes the last is seen by itself.
            num_steps = max(1, self.steps_that_fit(self.steps_to_next_end(), num_free - 1))
        self._begin(now, first, increment, num_steps, True)
        self.first_gap_ps = first_gap

    def _batch_prompts(self, now: int) -> None:
        num_free = self.num_blocks - self.num_used - self.num_reserved
        num_tokens = 0
        waiting = self.waiting
        while waiting and len(self.running) < self.max_num_seqs:
            request = waiting[0]
            num_blocks = -(-request.target // self.block_size)
            if num_free - num_blocks < self.watermark_blocks:
                self.is_blocked = True
                return
            num_tokens += request.target
            if num_tokens > self.max_batched_tokens:
                return
            self._dequeue(now)
            request.num_blocks = num_blocks
            self.num_used += num_blocks
            num_free -= num_blocks
            self.prefills.append((request, request.target))

    def _begin_prefill(self, now: int) -> None:
        costs = self.costs_copying if self.num_copies else self.costs
        cost = costs.prompts
        num_tokens = 0
        twice_pairs = 0
        for _, target in self.prefills:
            num_tokens += target
            twice_pairs += target * target
        if num_tokens > self.most_tokens:
            self.most_tokens = num_tokens
        duration = cost.base[num_tokens] + round(cost.half_pair * twice_pairs)
        self._begin(now, duration, 0, 1, False)

    def _fits_one_step(self) -> bool:
        """True if each request in turn finds a free block, in the order of arrival."""
        num_free = self.num_blocks - self.num_used - self.num_reserved
        needed = self.growth[self.progress % self.block_size]
        if needed != num_free:
            return needed < num_free
        # The last one finds a block only if it is the one that takes the last.
        last = max(self.running, key=_arrived_last)
        return (self.progress + last.offset) % self.block_size == 0


def _arrived_last(request: LiveRequest) -> tuple[int, int]:
    return request.arrival, request.row
