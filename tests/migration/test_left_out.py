"""Each item of what a request takes along matters: with it left out, something goes wrong.

The seams are the functions that carry the item; a test replaces one of them, and the answer of a
request that depends on the item is then not the one it would have had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.kv_hints.protocol import KvHintsEnvelope

from llumsched.engine.base import FinalState, RequestState
from llumsched.engine.transfer.access import LocalKV
from llumsched.engine.transfer.blocks import KVBlocks
from llumsched.engine.vllm.migration import exports, imports, state
from tests.migration import test_features
from tests.migration.cases import CASES, params
from tests.migration.leaving_out import capturing, moved
from tests.migration.pool import Pool


@pytest.fixture
def differs(pool: Pool, unmoved: dict[str, Any]) -> Callable[[str], bool]:
    """True if a case's answer is another one with what the test has replaced."""
    return lambda name: bool(moved(pool, name, CASES[name]) != unmoved[name])


@pytest.mark.parametrize("name", ["greedy", "seed", "JSON schema", "long prompt"])
def test_nothing_left_out(differs: Callable[[str], bool], name: str) -> None:
    """The control: the way these tests go about it changes nothing."""
    assert not differs(name)


# ---- the KV cache -------------------------------------------------------------------------------


def blocks_of(pool: Pool, index: int) -> KVBlocks:
    kv = pool.instances[index].port.kv
    assert isinstance(kv, LocalKV)
    return kv.groups[0]


@pytest.mark.parametrize("name", ["greedy", "long prompt"])
def test_kv(
    pool: Pool, differs: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(blocks_of(pool, 1), "scatter", lambda _ids, _staging: None)
    assert differs(name)


@pytest.mark.parametrize("name", ["greedy", "long prompt"])
def test_kv_of_the_last_stage_only(
    pool: Pool, differs: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The tail: the block that was not full while the request still decoded."""
    kv = blocks_of(pool, 1)
    scatter, calls = kv.scatter, []

    def all_but_the_last(block_ids: list[int], staging: torch.Tensor) -> None:
        calls.append(block_ids)
        if len(block_ids) > 1:
            scatter(block_ids[:-1], staging[: (len(block_ids) - 1) * kv.block_num_bytes])
        elif name == "long prompt" and len(calls) == 1:
            scatter(block_ids, staging)

    monkeypatch.setattr(kv, "scatter", all_but_the_last)
    assert differs(name)


# ---- what the worker keeps ----------------------------------------------------------------------


def installing(monkeypatch: pytest.MonkeyPatch, change: Callable[[FinalState], FinalState]) -> None:
    """Let the worker of the destination be told something else."""
    real = state.install_request

    def changed(
        worker: Any, request: EngineCoreRequest, block_ids: tuple[list[int], ...], final: FinalState
    ) -> None:
        real(worker, request, block_ids, change(final))

    monkeypatch.setattr(imports, "install_request", changed)


def test_generator(differs: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    def as_at_the_start(final: FinalState) -> FinalState:
        fresh = torch.Generator()
        fresh.manual_seed(7)
        return FinalState(
            output_token_ids=final.output_token_ids,
            num_computed_tokens=final.num_computed_tokens,
            generator_state=bytes(fresh.get_state().numpy()),
        )

    installing(monkeypatch, as_at_the_start)
    assert differs("seed")


def test_generator_at_all(differs: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "read_generator_state", lambda _worker, _request_id: None)
    assert differs("seed, top_p, top_k, min_p")


def test_grammar(differs: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "replay_grammar", lambda *_: None)
    assert differs("JSON schema")
    assert differs("regular expression")


# ---- what the request says ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameter", "default"),
    [
        ("seed", "temperature", 0.0),
        # Not the seed: it starts the generator, whose state comes along by itself.
        ("seed, top_p, top_k, min_p", "top_k", 1),
        ("repetition penalty", "repetition_penalty", 1.0),
        ("presence penalty", "presence_penalty", 0.0),
        ("frequency penalty", "frequency_penalty", 0.0),
        ("logit_bias", "logit_bias", None),
        ("bad words", "_bad_words_token_ids", None),
        ("allowed tokens", "allowed_token_ids", None),
        ("min_tokens", "min_tokens", 0),
        ("stop token", "stop_token_ids", []),
        ("length", "max_tokens", 100),
        ("logprobs", "logprobs", None),
        ("JSON schema", "structured_outputs", None),
        ("grammar", "structured_outputs", None),
        ("end of text", "_eos_token_id", None),
    ],
)
def test_sampling_parameter(
    differs: Callable[[str], bool],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    parameter: str,
    default: Any,
) -> None:
    def without(request: EngineCoreRequest) -> None:
        sampling = request.sampling_params
        assert isinstance(sampling, SamplingParams)
        setattr(sampling, parameter, default)
        if parameter == "stop_token_ids":
            sampling._all_stop_token_ids = set()

    capturing(monkeypatch, without)
    assert differs(name)


def test_prompt(differs: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The repetition penalty counts the prompt as well."""

    def another(request: EngineCoreRequest) -> None:
        assert request.prompt_token_ids is not None
        request.prompt_token_ids = [1] * len(request.prompt_token_ids)

    capturing(monkeypatch, another)
    assert differs("prompt under penalty")


def test_outputs_of_the_scheduler(
    differs: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them the destination would begin at the end of the prompt."""

    def without_the_last(**fields: Any) -> FinalState:
        fields["output_token_ids"] = fields["output_token_ids"][:-1]
        return FinalState(**fields)

    monkeypatch.setattr(exports, "FinalState", without_the_last)
    assert differs("greedy")


def test_cache_salt(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients without the salt must not find the prompt in a cache: it would be a leak."""

    def num_found_by_another() -> int | None:
        case = CASES["cache salt"]
        prompt = case.prompt(pool.tokenizer)
        answer = pool.submit("salted", prompt, case.params, **case.fields)
        pool.until(lambda: pool.num_tokens("salted") >= 2)
        assert pool.move(answer.sequence_ids[0], 1).outcome == "committed"
        pool.finish("salted")
        pool.submit("another", prompt, case.params, at=1)
        return pool.finish("another")[0].num_cached_tokens

    assert num_found_by_another() == 0
    for instance in pool.instances:
        instance.core.reset_prefix_cache()
    capturing(monkeypatch, lambda request: setattr(request, "cache_salt", None))
    assert num_found_by_another()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", -3),
        ("arrival_time", 1234.5),
        ("client_index", 1),
        ("trace_headers", {"traceparent": "00-1-2-01"}),
        ("session_id", "s"),
        ("kv_hints", KvHintsEnvelope("1", "m", [])),
    ],
)
def test_what_orders_and_routes_a_request(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, field: str, value: Any
) -> None:
    """At the destination the request has the field; with it left out it has not."""
    for is_left_out in (False, True):
        case = CASES["greedy"]
        name = f"{field} {is_left_out}"
        answer = pool.submit(name, case.prompt(pool.tokenizer), case.params)
        (sequence_id,) = answer.sequence_ids
        setattr(pool.instances[0].core.scheduler.requests[sequence_id], field, value)
        pool.until(lambda n=name: pool.num_tokens(n) >= 2)  # type: ignore[misc]
        if is_left_out:
            default = 0 if isinstance(value, int | float) else None
            capturing(monkeypatch, lambda r, d=default: setattr(r, field, d))  # type: ignore[misc]
        assert pool.move(sequence_id, 1).outcome == "committed"
        there = pool.instances[1].core.scheduler.requests[sequence_id]
        assert (getattr(there, field) == value) is not is_left_out
        pool.finish(name)


# ---- how the move itself is told apart ----------------------------------------------------------


def changing(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """Let the source say something else of the request than is so."""
    real = state.capture_request

    def changed(*arguments: Any, **keywords: Any) -> RequestState:
        return msgspec.structs.replace(real(*arguments, **keywords), **fields)

    monkeypatch.setattr(exports, "capture_request", changed)


def test_computed_tokens(differs: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """With another number of them the destination refuses, and the request stays."""

    def one_less(**fields: Any) -> FinalState:
        fields["num_computed_tokens"] -= 1
        return FinalState(**fields)

    monkeypatch.setattr(exports, "FinalState", one_less)
    assert differs("greedy")


def test_whether_it_has_kv(differs: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """A destination that expects none reserves nothing, and refuses what comes."""
    changing(monkeypatch, has_kv=False)
    assert differs("greedy")


def test_preemptions(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preemptions are the request's, wherever it was preempted."""
    for is_left_out in (False, True):
        name = f"preempted {is_left_out}"
        (sequence_id,) = pool.submit(name, [504, 2416], params()).sequence_ids
        pool.until(lambda n=name: pool.num_tokens(n) >= 2)  # type: ignore[misc]
        pool.instances[0].core.scheduler.requests[sequence_id].num_preemptions = 2
        if is_left_out:
            changing(monkeypatch, num_preemptions=0)
        pool.move(sequence_id, 1)
        there = pool.instances[1].core.scheduler.requests.get(sequence_id)
        # Without them the source sees a request that was preempted while it moved.
        assert (there is not None and there.num_preemptions == 2) is not is_left_out
        pool.finish(name)


def test_moves(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second arrival of a request looks like the first come late, and is not listened to."""
    (sequence_id,) = pool.submit("r", [504, 2416], params(max_tokens=200)).sequence_ids
    pool.until(lambda: pool.num_tokens("r") >= 2)
    changing(monkeypatch, placement_number=1)
    assert pool.move(sequence_id, 1).outcome == "committed"
    pool.until(lambda: pool.where(sequence_id) == 1)
    assert pool.move(sequence_id, 2).outcome == "committed"
    num_tokens = pool.num_tokens("r")
    there = pool.instances[2].core.scheduler.requests[sequence_id]
    pool.until(lambda: there.num_output_tokens > num_tokens + 2)
    assert (pool.where(sequence_id), pool.num_tokens("r")) == (1, num_tokens)
    pool.abort("r")


# ---- all of it ----------------------------------------------------------------------------------

# What carries a request, and for each of its fields the test that leaves it out, or why none does.
LEFT_OUT: dict[type[msgspec.Struct], dict[str, object]] = {
    FinalState: {
        "output_token_ids": test_outputs_of_the_scheduler,
        "num_computed_tokens": test_computed_tokens,
        "generator_state": test_generator_at_all,
        "draft_statistics": "of speculative decoding",
    },
    RequestState: {
        "request": test_prompt,
        "output_token_ids": "how much room to reserve; the final state has them all",
        "num_preemptions": test_preemptions,
        "placement_number": test_moves,
        "has_kv": test_whether_it_has_kv,
        "has_ended": "whether a request arrives, or blocks for the cache: test_ended",
        "step_time_s": "how much room to reserve",
    },
    EngineCoreRequest: {
        "request_id": "the name of what moves",
        "prompt_token_ids": test_prompt,
        "sampling_params": test_sampling_parameter,
        "lora_request": test_features.test_adapter_left_out,
        "reasoning_ended": test_features.test_start_of_reasoning_left_out,
        "reasoning_parser_kwargs": test_features.test_start_of_reasoning_left_out,
        "cache_salt": test_cache_salt,
        "arrival_time": test_what_orders_and_routes_a_request,
        "client_index": test_what_orders_and_routes_a_request,
        "priority": test_what_orders_and_routes_a_request,
        "trace_headers": test_what_orders_and_routes_a_request,
        "session_id": test_what_orders_and_routes_a_request,
        "kv_hints": test_what_orders_and_routes_a_request,
        "mm_features": "of models that take images",
        "pooling_params": "refused",
        "prompt_embeds": "refused",
        "prompt_is_token_ids": "refused: it goes with prompt embeddings",
        "resumable": "refused",
        "data_parallel_rank": "which engine of several; there is one an instance",
        "current_wave": "of data parallelism",
        "external_req_id": "stays in the frontend",
        "abort_immediately": "such a request never runs",
    },
}


@pytest.mark.parametrize("carrier", LEFT_OUT)
def test_nothing_is_forgotten(carrier: type[msgspec.Struct]) -> None:
    """A field that is new here, or in vLLM, is carried and left out, or has its reason."""
    assert set(LEFT_OUT[carrier]) == set(carrier.__struct_fields__)
