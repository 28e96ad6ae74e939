"""vLLM's own scheduler and the state that model runner V2 keeps, with no model between them.

The scheduler, its output objects and the runner's bookkeeping of requests (its slots, and how they
are taken and given back) are the real ones; a step samples a token that depends on all tokens that
the runner has of the request. Steps may be in flight. So whatever the sequences of suspending,
resuming and importing requests do to either side shows, in milliseconds and without a GPU.
Not here: kernels, the KV cache's content, and the sampler.
"""

from __future__ import annotations

import json
import queue
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import vllm.v1.worker.cpu.buffer_utils as cpu_buffers
import vllm.v1.worker.gpu.buffer_utils as gpu_buffers
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import PauseState
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.states import RequestState

from llumsched.engine.base import StepAhead
from llumsched.engine.vllm.migration import MigrationAdapter
from llumsched.engine.vllm.migration.port import EngineAdapter
from tests.builders import engine_request

BLOCK_SIZE = 16
NUM_BLOCKS = 64
MAX_LEN = 512
VOCAB_SIZE = 1000
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_LEN,
    "torch_dtype": "float32",
}


def engine_config(folder: Path, **flags: Any) -> VllmConfig:
    """The configuration of an engine whose model is never loaded."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    arguments: dict[str, Any] = {
        "max_model_len": MAX_LEN,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 2,
        "block_size": BLOCK_SIZE,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    config = EngineArgs(model=str(folder), **(arguments | flags)).create_engine_config()
    config.cache_config.num_gpu_blocks = NUM_BLOCKS
    return config


class RunnerV2(GPUModelRunner):
    """The bookkeeping of model runner V2 alone; ``tokens`` and ``blocks`` are what it was told."""

    def __init__(self, config: VllmConfig) -> None:
        # None of the base class's: that one makes a model.
        self.pooling_runner = self.pp_handler = self.encoder_cache = self.sampler = None
        self.prompt_logprobs_worker = self.adaptive_verification = self.kv_block_zeroer = None
        self.is_last_pp_rank = False
        self.model_state, self.lora_state, self.block_tables = MagicMock(), MagicMock(), MagicMock()
        self.tokens: dict[str, list[int]] = {}
        self.blocks: dict[str, list[int]] = {}
        with pytest.MonkeyPatch.context() as patched:
            # As vLLM does for runner V2 on a CPU.
            patched.setattr(gpu_buffers, "UvaBuffer", cpu_buffers.UvaBuffer)
            self.req_states = RequestState(
                max_num_reqs=config.scheduler_config.max_num_seqs,
                max_model_len=MAX_LEN,
                max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
                num_speculative_steps=0,
                vocab_size=VOCAB_SIZE,
                device=torch.device("cpu"),
            )
        self.req_states.apply_staged_writes = lambda: None  # type: ignore[method-assign]  # a kernel

    def run(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """The effect of ``execute_model`` on the state of requests, and a token of each."""
        self.finish_requests(output)
        self.add_requests(output)
        self.update_requests(output)
        for new in output.scheduled_new_reqs:
            assert new.prefill_token_ids is not None
            self.tokens[new.req_id] = list(new.prefill_token_ids)
            self.blocks[new.req_id] = list(new.block_ids[0])
        cached = output.scheduled_cached_reqs
        for request_id, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            self.blocks[request_id] += block_ids[0] if block_ids is not None else []
        sampled = [self._sample(request_id, output) for request_id in output.num_scheduled_tokens]
        request_ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(request_ids)},
            sampled_token_ids=sampled,
        )

    def _sample(self, request_id: str, output: SchedulerOutput) -> list[int]:
        state, tokens = self.req_states, self.tokens[request_id]
        index = state.req_id_to_index[request_id]
        num_computed = state.num_computed_tokens_np[index] + output.num_scheduled_tokens[request_id]
        assert num_computed <= len(self.blocks[request_id]) * BLOCK_SIZE
        if num_computed < len(tokens):
            return []
        tokens.append(next_token(tokens))
        return tokens[-1:]


def next_token(tokens: Sequence[int]) -> int:
    return hash(tuple(tokens)) % 900 + 100


def answer_of(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The tokens of a request that nothing happens to."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Engine:
    """A scheduler, its runner, and the port of migrations. At most ``num_in_flight`` steps are.

    While ``holds_prompts`` the scheduler is told to compute none, as engine cores tell it between
    the steps of ``--prefill-schedule-interval``.
    """

    def __init__(self, config: VllmConfig, *, num_in_flight: int = 1) -> None:
        config.scheduler_config.async_scheduling = num_in_flight > 1
        init_none_hash(sha256)
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.float32
        )
        manager = StructuredOutputManager(config)
        self.vllm_config = config
        self.structured_output_manager = manager
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(VllmConfig, "use_v2_model_runner", True)
            scheduler_class: Any = config.scheduler_config.get_scheduler_cls()
            self.scheduler = scheduler_class(
                vllm_config=config,
                kv_cache_config=KVCacheConfig(
                    num_blocks=NUM_BLOCKS,
                    kv_cache_tensors=[],
                    kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
                ),
                structured_output_manager=manager,
                block_size=BLOCK_SIZE,
            )
        assert self.scheduler.use_v2_model_runner
        self.runner = RunnerV2(config)
        self.output_queue: queue.Queue[Any] = queue.Queue()
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self._num_in_flight = num_in_flight
        self._steps: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._observers: dict[str, list[Any]] = defaultdict(list)
        self.answers: dict[str, list[int]] = {}
        self.step_time_s, self.ahead = 0.0, StepAhead()
        self.last: SchedulerOutput | None = None
        self.holds_prompts = False
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(EngineAdapter, "_open_kv_cache", lambda _: None)
            self.port = MigrationAdapter(self)  # type: ignore[arg-type]
        self.observe(after_step=self.port.after_step)

    # ---- what the port asks of an engine core ---------------------------------------------------

    def observe(self, **observers: Any) -> None:
        for name, observer in observers.items():
            self._observers[name].append(observer)

    def step_ahead(self) -> StepAhead:
        return self.ahead

    def collective_rpc(self, method: Any, args: tuple[Any, ...] = ()) -> list[Any]:
        return [method(SimpleNamespace(use_v2_model_runner=True, model_runner=self.runner), *args)]

    def preprocess_add_request(self, request: EngineCoreRequest) -> tuple[Request, int]:
        return Request.from_engine_core_request(request, self._hasher), 0

    def add_request(self, request: Request) -> None:
        self.scheduler.add_request(request)
        for observer in self._observers["on_add"]:
            observer(request)

    def reset(self) -> None:
        """Preempt everything and empty the prefix cache."""
        with ExitStack() as stack:
            for around in self._observers["around_reset"]:
                stack.enter_context(around())
            assert self.scheduler.reset_prefix_cache(reset_running_requests=True)

    # ---- what a test does -----------------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        num_tokens: int,
        lora: LoRARequest | None = None,
        **sampling: Any,
    ) -> None:
        request = engine_request(
            request_id,
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(max_tokens=num_tokens, ignore_eos=True, **sampling),
            arrival_time=float(len(self.answers)),
            lora_request=lora,
        )
        self.answers.setdefault(request_id, [])
        self.add_request(self.preprocess_add_request(request)[0])

    def step(self) -> dict[str, int]:
        """Schedule a step and take in what the oldest in flight has sampled; the tokens of each
        request in the step that was scheduled."""
        for observer in self._observers["before_step"]:
            observer()
        scheduled: dict[str, int] = {}
        if self.scheduler.has_requests():
            self.last = self.scheduler.schedule(self.holds_prompts)
            scheduled = dict(self.last.num_scheduled_tokens)
            self._steps.append((self.last, self.runner.run(self.last)))
        if len(self._steps) >= self._num_in_flight or (self._steps and not scheduled):
            output, sampled = self._steps.popleft()
            for outputs in self.scheduler.update_from_output(output, sampled).values():
                for each in outputs.outputs:
                    self.answers[each.request_id] += each.new_token_ids
        for observer in self._observers["after_step"]:
            observer()
        self._check()
        return scheduled

    def until(self, request_id: str, num_tokens: int) -> None:
        """Step until the request has so many tokens."""
        for _ in range(200):
            if len(self.answers[request_id]) >= num_tokens:
                return
            self.step()
        raise AssertionError(f"{request_id} has {self.answers[request_id]}")

    def finish(self) -> None:
        for _ in range(400):
            if not self.scheduler.has_requests() and not self._steps:
                break
            self.step()
        assert not self.scheduler.requests
        assert self.num_free_blocks == NUM_BLOCKS - 1
        assert not self.runner.req_states.req_id_to_index or not self.scheduler.finished_req_ids

    def request(self, request_id: str) -> Request:
        request: Request = self.scheduler.requests[request_id]
        return request

    @property
    def num_free_blocks(self) -> int:
        num: int = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return num

    def pause(self, *, everything: bool = True) -> None:
        self.scheduler.set_pause_state(
            PauseState.PAUSED_ALL if everything else PauseState.PAUSED_NEW
        )

    def unpause(self) -> None:
        self.scheduler.set_pause_state(PauseState.UNPAUSED)

    def _check(self) -> None:
        """The runner knows of every running request what the scheduler knows."""
        scheduler = self.scheduler
        assert len(scheduler.running) <= scheduler.max_num_running_reqs
        for request in scheduler.running:
            request_id = request.request_id
            assert request_id in self.runner.req_states.req_id_to_index
            known = self.runner.tokens[request_id]
            assert known[: request.num_tokens] == list(request.all_token_ids)
            (held,) = scheduler.kv_cache_manager.get_block_ids(request_id)
            assert self.runner.blocks[request_id] == held


def move(request_id: str, source: Engine, destination: Engine) -> None:
    """Move a request at once; steps may be in flight before, at the source and after."""
    reservation_of = source.port.start_export(request_id)
    destination.port.reserve(reservation_of)
    suspension = source.port.suspend(request_id)
    while not suspension.done():
        source.step()
    final = suspension.result().final
    destination.port.grow(request_id, suspension.result().blocks.num_tokens)
    destination.answers[request_id] = source.answers[request_id]
    destination.port.commit(request_id, final)
    source.port.release(request_id)


@contextmanager
def suspended(request_id: str, engine: Engine) -> Iterator[None]:
    """A request of an engine is suspended meanwhile, and rolled back."""
    engine.port.start_export(request_id)
    engine.port.suspend(request_id)
    yield
    engine.port.resume(request_id)
