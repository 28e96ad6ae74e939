"""The two engines once more, token by token and request by request, as their code has them.

An independent model to check the closed form against: every step walks every request, blocks are
counted for each request by itself, and each token's time is written down.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from llumsched.simulator.engines.cost import StepCost


@dataclass
class Naive:
    """One request and what became of it; times in picoseconds."""

    arrival: int
    num_prompt: int
    num_output: int
    num_computed: int = 0
    num_blocks: int = 0
    num_preemptions: int = 0
    scheduled: int = -1
    is_prefill: bool = True
    """Until it has caught up with its tokens; again after an eviction."""
    token_times: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt + len(self.token_times)

    @property
    def is_finished(self) -> bool:
        return len(self.token_times) == self.num_output

    @property
    def gaps(self) -> list[int]:
        return [b - a for a, b in itertools.pairwise(self.token_times)]

    @property
    def longest_gap(self) -> int:
        return max(self.gaps, default=0)


@dataclass
class NaiveEngine(ABC):
    """Common parts of both versions: a pool of blocks, a queue, a running list, and a clock."""

    cost: StepCost
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_batched_tokens: int
    watermark_blocks: int
    num_free: int = 0
    waiting: list[Naive] = field(default_factory=list)
    running: list[Naive] = field(default_factory=list)
    num_steps: int = 0

    def run(self, requests: list[Naive]) -> None:
        """Until all have finished."""
        self.num_free = self.num_blocks
        now = 0
        coming = sorted(requests, key=lambda r: r.arrival)
        while coming or self.waiting or self.running:
            if not (self.waiting or self.running):
                now = max(now, coming[0].arrival)
            while coming and coming[0].arrival <= now:
                self.waiting.append(coming.pop(0))
            now = self.step(now)

    @abstractmethod
    def step(self, now: int) -> int:
        """One engine step; when it ends."""

    def blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, request: Naive, num_tokens: int) -> bool:
        """Blocks for this many tokens in all, or nothing."""
        more = max(0, self.blocks_of(num_tokens) - request.num_blocks)
        if more > self.num_free:
            return False
        self.num_free -= more
        request.num_blocks += more
        return True

    def preempt(self, request: Naive) -> None:
        self.running.remove(request)
        self.num_free += request.num_blocks
        request.num_blocks = 0
        request.num_computed = 0
        request.num_preemptions += 1
        request.is_prefill = True
        self.waiting.insert(0, request)

    def execute(self, now: int, scheduled: list[tuple[Naive, int]]) -> int:
        """Compute these (request, tokens); those that are up to date yield a token."""
        decodes = [r for r, _ in scheduled if not r.is_prefill]
        prefills = [(r, n) for r, n in scheduled if r.is_prefill]
        contexts = [r.num_computed for r in decodes]
        longest = max(contexts, default=0)
        end = now + self.cost.step(
            num_prefill_tokens=sum(n for _, n in prefills),
            twice_prefill_pairs=sum(n * (2 * r.num_computed + n) for r, n in prefills),
            num_decodes=len(decodes),
            num_kv_tokens=sum(contexts),
            num_skew_tokens=sum(longest - c for c in contexts),
        )
        for request, num_tokens in scheduled:
            if request.scheduled < 0:
                request.scheduled = now
            request.num_computed += num_tokens
            if request.num_computed == request.num_tokens:
                request.token_times.append(end)
                request.is_prefill = False
            if request.is_finished:
                self.running.remove(request)
                self.num_free += request.num_blocks
        self.num_steps += 1
        return end


class NaiveV1(NaiveEngine):
    """`vllm/v1/core/sched/scheduler.py`, the parts that matter here."""

    def step(self, now: int) -> int:
        budget = self.max_batched_tokens
        scheduled: list[tuple[Naive, int]] = []
        has_preempted = False
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            num_new = min(request.num_tokens - request.num_computed, budget)
            fits = True
            while not self.allocate(request, request.num_computed + num_new):
                victim = self.running[-1]
                self.preempt(victim)
                has_preempted = True
                if victim is request:
                    fits = False
                    break
            if not fits:
                break
            scheduled.append((request, num_new))
            budget -= num_new
            index += 1
        while not has_preempted and self.waiting and budget > 0:
            if len(self.running) == self.max_num_seqs:
                break
            request = self.waiting[0]
            watermark = self.watermark_blocks if self.running else 0
            if self.blocks_of(request.num_tokens) + watermark > self.num_free:
                break
            num_new = min(request.num_tokens, budget)
            assert self.allocate(request, num_new)
            self.running.append(self.waiting.pop(0))
            scheduled.append((request, num_new))
            budget -= num_new
        # A step that only evicted takes no time here: the next one admits.
        return self.execute(now, scheduled) if scheduled else now


class NaiveV01(NaiveEngine):
    """`vllm/core/scheduler.py` of vLLM 0.1, the parts that matter here."""

    def step(self, now: int) -> int:
        prompts: list[tuple[Naive, int]] = []
        num_tokens = 0
        while self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            num_blocks = self.blocks_of(request.num_tokens)
            if self.num_free - num_blocks < self.watermark_blocks:
                break
            num_tokens += request.num_tokens
            if num_tokens > self.max_batched_tokens:
                break
            assert self.allocate(request, request.num_tokens)
            self.running.append(self.waiting.pop(0))
            prompts.append((request, request.num_tokens))
        if prompts:
            return self.execute(now, prompts)
        queue = sorted(self.running, key=lambda r: r.arrival)
        decodes: list[tuple[Naive, int]] = []
        while queue:
            request = queue.pop(0)
            evicted_itself = False
            # One block must be free for each in turn, needed or not.
            while self.num_free < 1:
                victim = queue.pop() if queue else request
                self.preempt(victim)
                if victim is request:
                    evicted_itself = True
                    break
            if evicted_itself:
                break
            self.allocate(request, request.num_computed + 1)
            decodes.append((request, 1))
        return self.execute(now, decodes) if decodes else now
