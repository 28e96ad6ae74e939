"""Parts of a step of the engine, read from the scheduler's own output.

Invariant: the scheduler decides as it would without: its answer is looked at and passed on. This
module does not know how long a step takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from llumsched.core.step_time import MeasuredStep


class StepRecorder:
    """Sees the batches that a scheduler makes, while `is_recording`, and counts tokens of all.

    Args:
        note_num_tokens: hears of each batch how many tokens it has.
    """

    def __init__(
        self, scheduler: Any, note_num_tokens: Callable[[int], None] = lambda _: None
    ) -> None:
        self._scheduler: Scheduler = scheduler
        self._schedule = scheduler.schedule
        self._note_num_tokens = note_num_tokens
        self._batch: MeasuredStep | None = None
        self.is_recording = True
        scheduler.schedule = self._record

    def take(self) -> MeasuredStep | None:
        """The batch since the last call, without its duration; None if there was none to run."""
        batch, self._batch = self._batch, None
        return batch if batch and batch.num_prefill_tokens + batch.num_decodes else None

    def _record(self, *args: Any, **options: Any) -> SchedulerOutput:
        output: SchedulerOutput = self._schedule(*args, **options)
        self._note_num_tokens(output.total_num_scheduled_tokens)
        if self.is_recording:
            self._batch = self._describe(output)
        return output

    def _describe(self, output: SchedulerOutput) -> MeasuredStep:
        num_prefill_tokens = num_pairs = 0
        contexts = []
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            request = self._scheduler.requests.get(request_id)
            if request is None:
                continue
            # Already counts what this step computes.
            after: int = request.num_computed_tokens
            num_drafts = len(output.scheduled_spec_decode_tokens.get(request_id, ()))
            if request.num_output_tokens > 0 and num_tokens == 1 + num_drafts:
                contexts.append(after)
            else:
                num_prefill_tokens += num_tokens
                num_pairs += num_tokens * (after - num_tokens) + num_tokens * (num_tokens + 1) // 2
        return MeasuredStep(
            num_prefill_tokens=num_prefill_tokens,
            num_pairs=num_pairs,
            num_decodes=len(contexts),
            num_kv_tokens=sum(contexts),
            num_skew_tokens=len(contexts) * max(contexts, default=0) - sum(contexts),
            seconds=float("nan"),
        )
