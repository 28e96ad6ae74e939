"""Two real vLLM engines on CPU in this process, with real migrations between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm.sampling_params import SamplingParams

from tests.contract.subjects import BLOCK_SIZE, MAX_BATCHED_TOKENS, NUM_BLOCKS
from tests.migration.pool import Pool


class RealInstances:
    """A pool of two engines. Their requests are of one sequence, so one name is enough."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._num_outputs: dict[str, int] = {}
        self._num_preemptions: dict[str, int] = {}

    @staticmethod
    def boot(model: str) -> Pool:
        """The engines, with as many blocks as the simulated ones."""
        return Pool(
            model,
            num_instances=2,
            block_size=BLOCK_SIZE,
            # vLLM keeps a block that no request may have.
            num_gpu_blocks_override=NUM_BLOCKS + 1,
            max_model_len=NUM_BLOCKS * BLOCK_SIZE,
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
            async_scheduling=False,
        )

    def submit(self, request_id: str, prompt: Sequence[int], num_output_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=num_output_tokens, ignore_eos=True)
        self._num_outputs[request_id] = num_output_tokens
        self._pool.submit(request_id, prompt, params)

    def until(self, condition: Callable[[], bool]) -> None:
        self._pool.until(condition)

    def num_tokens(self, request_id: str) -> int:
        return min(self._pool.num_tokens(request_id), self._num_outputs[request_id])

    def num_preemptions(self, request_id: str) -> int:
        (sequence_id,) = self._pool.answers[request_id].sequence_ids
        for instance in self._pool.instances:
            request = instance.core.scheduler.requests.get(sequence_id)
            if request is not None:
                self._num_preemptions[request_id] = request.num_preemptions
        return self._num_preemptions[request_id]

    def num_used_blocks(self, index: int) -> int:
        return NUM_BLOCKS - self._pool.instances[index].num_free_blocks

    def move(self, request_id: str) -> None:
        (sequence_id,) = self._pool.answers[request_id].sequence_ids
        report = self._pool.move(sequence_id, 1)
        assert report.outcome == "committed", report
