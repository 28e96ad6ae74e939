"""Requests whose instance died, taken over from what their client has been sent.

The frontend knows prompt, parameters and the tokens it has passed on; the KV cache is gone. To the
engine such a request is one that was preempted: its outputs are given, and prompt and outputs are
computed again before the next token. Penalties, ``min_tokens``, ``max_tokens`` and stop conditions
see the same outputs as ever, a grammar is brought to where they lead, and a seeded generator draws
as often as it has drawn.

Invariant: afterwards the engine has the request exactly once: a copy that an unfinished migration
has left here, or is about to, makes way. Every method runs on the engine's loop thread.
This module does not know how the loss was noticed, nor which instance was chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

import msgspec
import torch
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.engine import EngineCoreRequest

from llumsched.engine.base import CannotMigrate, FinalState, RequestState
from llumsched.engine.vllm.core import LlumschedEngineCore
from llumsched.engine.vllm.migration import MigrationAdapter
from llumsched.engine.vllm.migration.speculation import num_draws_of_a_step
from llumsched.engine.vllm.migration.state import decode_request, encode_request

# How often a migration that brings the request here as well is asked to end.
MAX_ATTEMPTS = 5


def why_not_resumable(request: EngineCoreRequest) -> str | None:
    """Reason in a request why no other instance can go on with its outputs, or ``None``."""
    if request.pooling_params is not None:
        return "pooling requests have no outputs to go on from"
    if any(feature.data is None for feature in request.mm_features or ()):
        return "an image or other input of it is only in a cache of the instance that is gone"
    if request.prompt_embeds is not None:
        return "prompt embeddings are not kept"
    if request.resumable:
        return "a streaming-input session stays where it began"
    return None


def state_to_resume(
    request: EngineCoreRequest, output_token_ids: list[int], placement_number: int
) -> RequestState:
    """State that another instance needs, in the form in which requests without KV migrate."""
    sampling = request.sampling_params
    if output_token_ids and sampling is not None and sampling.prompt_logprobs is not None:
        # The client has them: they came with the first token.
        sampling = sampling.clone()
        sampling.prompt_logprobs = None
    carried = msgspec.structs.replace(request, sampling_params=sampling)
    return RequestState(
        request=encode_request(carried),
        output_token_ids=output_token_ids,
        num_preemptions=0,
        placement_number=placement_number,
        has_kv=False,
    )


class Resumption:
    """Takes requests over into one engine.

    Args:
        give_up_arrival: ends every migration by which this request is arriving here, the only way
            to have nothing written into its blocks any more; callable from any thread.
    """

    def __init__(
        self,
        engine: LlumschedEngineCore,
        port: MigrationAdapter,
        give_up_arrival: Callable[[str], Future[None]],
    ) -> None:
        self._engine = engine
        self._port = port
        self._give_up_arrival = give_up_arrival

    def resume(self, encoded: bytes) -> Future[str | None]:
        """Take over the request of an encoded ``RequestState``.

        Returns:
            a future of ``None``, or of the reason why it cannot go on here.
        """
        answer: Future[str | None] = Future()
        self._resume(msgspec.msgpack.decode(encoded, type=RequestState), answer, MAX_ATTEMPTS)
        return answer

    def _resume(
        self, state: RequestState, answer: Future[str | None], num_attempts_left: int
    ) -> None:
        core_request = decode_request(state)
        request_id = core_request.request_id
        if self._port.is_arriving(request_id):
            if not num_attempts_left:
                answer.set_result("a migration of the request to this instance does not end")
                return
            self._give_up_arrival(request_id).add_done_callback(
                lambda _: self._engine.call(
                    lambda: self._resume(state, answer, num_attempts_left - 1)
                )
            )
            return
        # Aborts that came before this call mean an old copy; left for later they would end this.
        self._engine._process_aborts_queue()  # type: ignore[no-untyped-call]
        if request_id in self._engine.scheduler.requests:
            self._engine.abort_requests([request_id])
        try:
            reservation = self._port.reserve(state, may_wait=True)
        except CannotMigrate as error:
            answer.set_result(str(error))
            return
        if reservation.grammar is None:
            self._commit(core_request, state, answer)
        else:
            # A grammar is compiled on a thread of its own.
            reservation.grammar.add_done_callback(
                lambda _: self._engine.call(lambda: self._commit(core_request, state, answer))
            )

    def missing(self, request_ids: list[str]) -> list[str]:
        """The requests that this engine does not have."""
        return [
            request_id
            for request_id in request_ids
            if request_id not in self._engine.scheduler.requests
            and not self._port.is_arriving(request_id)
        ]

    def _commit(
        self, core_request: EngineCoreRequest, state: RequestState, answer: Future[str | None]
    ) -> None:
        try:
            final = FinalState(
                output_token_ids=state.output_token_ids,
                num_computed_tokens=0,
                generator_state=self._generator_state(core_request, len(state.output_token_ids)),
            )
            self._port.commit(core_request.request_id, final)
            self._engine.collective_rpc(make_rewindable, args=(core_request.request_id,))
        except CannotMigrate as error:
            answer.set_result(str(error))
        except Exception as error:
            answer.set_exception(error)
        else:
            answer.set_result(None)

    def _generator_state(self, core_request: EngineCoreRequest, num_draws: int) -> bytes | None:
        sampling = core_request.sampling_params
        if not num_draws or not _is_seeded(sampling):
            return None
        states: list[bytes | None] = self._engine.collective_rpc(
            generator_state_after, args=(sampling, num_draws)
        )
        return states[0]


def _is_seeded(sampling: SamplingParams | None) -> bool:
    return sampling is not None and sampling.sampling_type == SamplingType.RANDOM_SEED


# ---- run inside a worker, through the executor's collective_rpc -----------------------------


def generator_state_after(worker: Any, sampling: SamplingParams, num_draws: int) -> bytes | None:
    """The state of a request's generator after so many tokens; ``None`` where none is kept."""
    if worker.use_v2_model_runner:
        return None
    generator = torch.Generator(device=worker.model_runner.device)
    generator.manual_seed(cast(int, sampling.seed))
    num_draws *= num_draws_of_a_step(worker.vllm_config)
    _draw(worker.model_runner, generator, num_draws)
    return bytes(generator.get_state().numpy())


def make_rewindable(worker: Any, request_id: str) -> None:
    """Let vLLM take back what it draws for a part of a prompt, on CPU as well.

    It does so by an offset, which the generators of CPUs do not have.
    """
    if worker.use_v2_model_runner or worker.model_runner.device.type != "cpu":
        return
    cached = worker.model_runner.requests.get(request_id)
    if cached is None or cached.generator is None:
        return
    runner = worker.model_runner
    num_draws = num_draws_of_a_step(worker.vllm_config)
    cached.generator = RewindableGenerator(
        cached.generator,
        seed=cached.sampling_params.seed,
        draw=lambda generator: _draw(runner, generator, num_draws * len(cached.output_token_ids)),
    )


def _draw(runner: Any, generator: torch.Generator, num_draws: int) -> None:
    """Draw as for so many tokens: by the sampler itself, whatever it draws for one."""
    logits = torch.zeros(1, runner.input_batch.vocab_size, device=runner.device)
    for _ in range(num_draws):
        runner.sampler.topk_topp_sampler(logits, {0: generator}, None, None)


class RewindableGenerator(torch.Generator):
    """A generator of a CPU that can take back its last draw, the only way vLLM ever rewinds one."""

    def __new__(cls, *_: Any, **__: Any) -> RewindableGenerator:
        return super().__new__(cls, device="cpu")  # type: ignore[call-arg]

    def __init__(
        self, other: torch.Generator, *, seed: int, draw: Callable[[torch.Generator], None]
    ) -> None:
        self._seed = seed
        self._draw = draw
        self.set_state(other.get_state())

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        """Back to before the last draw, whatever ``offset``: it is that of a GPU's generator."""
        self.manual_seed(self._seed)
        self._draw(self)
        return self
