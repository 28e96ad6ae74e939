"""Measuring the steps of one engine: what each was made of, and how long it took.

The engine runs in this process and one step at a time, so that a step's batch and its duration
belong together; the batch is read from the scheduler's own output. Prompts are random tokens, and
prefix caching is off: nothing is found, everything is computed. Steps of many shapes are wanted,
not a likeness of traffic.

This module does not know step-time models: it only measures.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.llm_engine import LLMEngine

from llumsched.core.step_time import MeasuredStep
from llumsched.engine.vllm.step_recorder import StepRecorder

_OUTPUT_TOKENS = 12
_REPEATS = 2
_FIRST_TOKEN, _LAST_TOKEN = 100, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """Measurements of one engine."""

    steps: tuple[MeasuredStep, ...]
    num_blocks: int
    """Blocks that can hold tokens: vLLM keeps one back."""
    block_size: int
    kv_bytes_per_token: int
    boot_s: float
    model: str
    model_config: Mapping[str, Any]
    """Part of its `config.json` on the part that decodes."""
    dtype: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests that begin together, and those that join once the first ones decode."""

    contexts: tuple[int, ...]
    joining: tuple[int, ...] = ()

    @property
    def cost(self) -> int:
        """Tokens to compute, roughly."""
        return sum(self.contexts) + sum(self.joining)


def profile_engine(
    arguments: EngineArgs,
    *,
    budget_s: float,
    progress: Callable[[int, int], None] | None = None,
) -> EngineProfile:
    """Boot an engine and measure its steps for about `budget_s` seconds.

    `progress` gets the number of workloads done, and of all of them.
    """
    # In another process the scheduler could not be watched.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    arguments = replace(
        arguments, enable_prefix_caching=False, async_scheduling=False, disable_log_stats=True
    )
    began_s = time.perf_counter()
    engine = LLMEngine.from_engine_args(arguments)
    boot_s = time.perf_counter() - began_s
    core: Any = engine.engine_core
    scheduler: Scheduler = core.engine_core.scheduler
    kv = scheduler.kv_cache_config
    config = engine.vllm_config
    block_size = scheduler.block_size
    num_blocks = kv.num_blocks - 1
    recorder = StepRecorder(scheduler)
    workloads = plan(
        max_num_seqs=config.scheduler_config.max_num_seqs,
        max_model_len=config.model_config.max_model_len,
        num_kv_tokens=num_blocks * block_size,
    )
    rng = random.Random(0)
    _run(engine, recorder, workloads[0], rng)  # whatever the first steps compile or load
    steps: list[MeasuredStep] = []
    until_s = time.perf_counter() + budget_s
    for number, workload in enumerate(workloads, start=1):
        for _ in range(_REPEATS):
            steps += _run(engine, recorder, workload, rng)
        if progress is not None:
            progress(number, len(workloads))
        if time.perf_counter() > until_s:
            break
    return EngineProfile(
        steps=tuple(steps),
        num_blocks=num_blocks,
        block_size=block_size,
        kv_bytes_per_token=sum(t.size for t in kv.kv_cache_tensors) // kv.num_blocks // block_size,
        boot_s=boot_s,
        model=config.model_config.model,
        model_config=config.model_config.hf_text_config.to_dict(),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        device=config.device_config.device_type,
    )


def plan(*, max_num_seqs: int, max_model_len: int, num_kv_tokens: int) -> list[Workload]:
    """Workloads of many shapes that fit the engine, the cheapest first.

    Single prompts, batches of equal and of unequal contexts, and prompts that join a batch. After
    the cheapest they come in an order that has covered the whole range of costs whenever it ends.
    """
    longest = min(max_model_len, num_kv_tokens) - _OUTPUT_TOKENS
    lengths = list(_doubling(16, longest))
    workloads = [Workload(contexts=(length,)) for length in lengths]
    for size in _doubling(2, max_num_seqs):
        for length in lengths:
            workloads.append(Workload(contexts=(length,) * size))
        spread = tuple(lengths[i % len(lengths)] for i in range(size))
        workloads.append(Workload(contexts=spread))
        workloads += [
            Workload(contexts=(lengths[0],) * (size - 1), joining=(length,))
            for length in lengths[2:]
        ]
    fitting = [
        workload
        for workload in workloads
        if workload.cost + _OUTPUT_TOKENS * max_num_seqs <= num_kv_tokens
    ]
    by_cost = sorted(fitting or workloads[:1], key=lambda workload: workload.cost)
    width = len(by_cost).bit_length()
    return [by_cost[i] for i in sorted(range(len(by_cost)), key=lambda i: f"{i:0{width}b}"[::-1])]


def _doubling(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2


def _run(
    engine: LLMEngine, recorder: StepRecorder, workload: Workload, rng: random.Random
) -> list[MeasuredStep]:
    """The steps of a workload, from the first to the last token of it."""
    steps: list[MeasuredStep] = []
    _add(engine, workload.contexts, rng)
    joining: Sequence[int] = workload.joining
    while engine.has_unfinished_requests():
        if joining and steps and not steps[-1].num_prefill_tokens:
            _add(engine, joining, rng)
            joining = ()
        began_s = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - began_s
        batch = recorder.take()
        if batch is not None:
            steps.append(msgspec.structs.replace(batch, seconds=seconds))
    return steps


def _add(engine: LLMEngine, lengths: Sequence[int], rng: random.Random) -> None:
    for length in lengths:
        tokens = [rng.randint(_FIRST_TOKEN, _LAST_TOKEN) for _ in range(length)]
        engine.add_request(
            f"profile-{rng.getrandbits(64):x}",
            {"prompt_token_ids": tokens},
            SamplingParams(max_tokens=_OUTPUT_TOKENS, ignore_eos=True, temperature=0.0),
        )
