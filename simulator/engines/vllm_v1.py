"""Today's vLLM (V1 scheduler, read in 0.32): one mixed batch a step, prompts in chunks.

In each step every decode computes one token, also those that come with their KV: a request that
moved here, or that a move was given up of, is in the next step whatever prompts are under way. A
prompt under way, then new ones, take what is left of the token budget. Short of blocks, requests
are evicted from the tail of the running list and recomputed; a step that evicted admits nobody. A
new request is admitted when the blocks of its whole prompt, less what the prefix cache holds, are
free above the watermark, which an otherwise empty engine ignores; it is given the blocks of its
first chunk.

Not modelled: speculative decoding, encoders, LoRA, the overlap of scheduling with execution.
"""

from __future__ import annotations

from typing import Any

from llumsched.core.step_time import MeasuredStep
from llumsched.simulator.engines.base import Engine
from llumsched.simulator.engines.request import LiveRequest
from llumsched.simulator.kernel import PS_PER_S


class EngineV1(Engine):
    """See the module docstring."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self._partial: LiveRequest | None = None
        """The request whose prompt is computed in part; always the last of the running."""

    def _schedule(self, now: int) -> None:
        has_evicted = False
        num_free = self.num_blocks - self.num_used - self.num_reserved
        if self.num_decodes:
            phase = self.progress % self.block_size
            growth = self.growth
            while growth[phase] > num_free:
                self._preempt(next(reversed(self.running)), now)
                self._partial = None
                has_evicted = True
                num_free = self.num_blocks - self.num_used - self.num_reserved
            num_free -= growth[phase]
        self.is_blocked = False
        if self.holding and not has_evicted:
            num_free = self._take_arrivals(num_free)
        partial = self._partial
        if partial is not None:
            budget = self.max_batched_tokens - self.num_decodes
            chunk = min(partial.target - partial.computed, budget)
            needed = -(-(partial.computed + chunk) // self.block_size) - partial.num_blocks
            if needed > num_free:
                # The last of the running is itself.
                self._preempt(partial, now)
                self._partial = None
                has_evicted = True
            elif chunk:
                self._take_chunk(partial, chunk, needed)
                num_free -= needed
        if has_evicted and not self.running:
            # An empty step; the next one admits.
            has_evicted = False
            num_free = self.num_blocks - self.num_used - self.num_reserved
            if self.holding:
                num_free = self._take_arrivals(num_free)
        if self.waiting and not self.holding and not has_evicted:
            self._admit(num_free, now)
        self._start_step(now, may_last=not has_evicted)

    def _take_arrivals(self, num_free: int) -> int:
        """Let those that hold their KV decode from the coming step on; the blocks left free."""
        holding, running = self.holding, self.running
        num_before = len(holding)
        while holding and len(running) < self.max_num_seqs:
            needed = 0 if holding[0].computed % self.block_size else 1
            if needed + (self.watermark_blocks if running else 0) > num_free:
                self.is_blocked = True
                break
            self._take_holding(holding.popleft())
            num_free -= needed
        if self._partial is not None and len(holding) < num_before:
            # The prompt under way stays the last of the running.
            running[self._partial] = running.pop(self._partial)
        return num_free

    def _take_chunk(self, request: LiveRequest, chunk: int, num_taken: int) -> None:
        """Compute a chunk in the coming step, with `num_taken` blocks more in use."""
        computed = request.computed + chunk
        request.num_blocks = -(-computed // self.block_size)
        self.num_used += num_taken
        self.prefills.append((request, chunk))
        self._partial = request if computed < request.target else None
        if self.cache is not None and request.hashes:
            # vLLM names the blocks of a chunk when it is scheduled.
            full = min(computed // self.block_size, len(request.hashes))
            named = self.cache.store(request.hashes[len(request.held) : full])
            request.held = [*request.held, *named]

    def _admit(self, num_free: int, now: int) -> None:
        budget = self.max_batched_tokens - self.num_decodes
        for _, chunk in self.prefills:
            budget -= chunk
        waiting, running = self.waiting, self.running
        block_size = self.block_size
        while waiting and budget > 0 and len(running) < self.max_num_seqs:
            watermark = self.watermark_blocks if running else 0
            request = waiting[0]
            target = request.target
            num_found = num_idle = 0
            if self.cache is not None and request.hashes:
                # The last token is computed in any case, for what follows it.
                self.cache.shrink(num_free)
                num_found, num_idle = self.cache.match(request.hashes, (target - 1) // block_size)
            if -(-target // block_size) - num_found + num_idle + watermark > num_free:
                self.is_blocked = True
                return
            self._dequeue(now)
            if num_found:
                assert self.cache is not None
                request.held = request.hashes[:num_found]
                self.cache.hold(request.held)
                request.computed = num_found * block_size
                if request.scheduled == now and not request.num_preemptions:
                    request.num_cached = request.computed
            chunk = min(target - request.computed, budget)
            num_taken = -(-(request.computed + chunk) // block_size) - num_found + num_idle
            self._take_chunk(request, chunk, num_taken)
            num_free -= num_taken
            budget -= chunk

    def _start_step(self, now: int, may_last: bool) -> None:
        b = self.num_decodes
        prefills = self.prefills
        costs = self.costs_copying if self.num_copies else self.costs
        if prefills:
            cost = costs.prompts
            num_tokens = b
            twice_pairs = 0
            for request, chunk in prefills:
                num_tokens += chunk
                twice_pairs += chunk * (2 * request.computed + chunk)
            duration = cost.base[num_tokens] + round(cost.half_pair * twice_pairs)
            if b:
                duration += self._decode_series(cost)[0] - cost.base[b]
            if num_tokens > self.most_tokens:
                self.most_tokens = num_tokens
            if self.measures_steps:
                self.begun_prompt_step = MeasuredStep(
                    num_prefill_tokens=num_tokens - b,
                    num_pairs=twice_pairs // 2,
                    num_decodes=b,
                    num_kv_tokens=b * self.progress + self.offset_sum,
                    num_skew_tokens=0,
                    seconds=duration / PS_PER_S,
                )
            self._begin(now, duration, 0, 1, b > 0)
        elif b:
            first, increment = self._decode_series(costs.decodes)
            num_steps = 1
            if may_last:
                num_free = self.num_blocks - self.num_used - self.num_reserved
                num_steps = self.steps_that_fit(self.steps_to_next_end(), num_free)
            self._begin(now, first, increment, num_steps, True)
