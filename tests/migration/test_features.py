"""Features to be switched on: LoRA, reasoning, asynchronous scheduling. Exact there as well.

The engines are of a tiny model, and boot in no time. LoRA has engines of its own: on a CPU vLLM
answers otherwise for requests that share a batch with those of an adapter, moved or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from llumsched.engine.vllm.migration import imports
from tests.campaigns import THOROUGH
from tests.migration import adapters, reasoning
from tests.migration.answers import seen_by_client
from tests.migration.cases import CASES, Case, params
from tests.migration.leaving_out import capturing, moved
from tests.migration.pool import Pool, events_that_are_over
from tests.migration.ways import answers_of, in_a_circle

pytestmark = pytest.mark.skipif(not THOROUGH, reason="boots engines of other kinds")

# By its budget the reasoning ends between the second move and the third.
BUDGET = 10


class Reasoning(Case):
    """A request whose prompt ends where its reasoning begins."""

    def prompt(self, tokenizer: Any) -> list[int]:
        return [*super().prompt(tokenizer), reasoning.START_ID]


def after_reasoning(reasoning_ended: bool | None = None, **fields: Any) -> Case:
    """Fields of a form, once the reasoning is over."""
    form = StructuredOutputsParams(regex="[a-z]{5,9}( [a-z]{5,9}){5}")
    return Reasoning(
        params(structured_outputs=form, max_tokens=40, **fields),
        {"reasoning_parser_kwargs": {"thinking": True}, "reasoning_ended": reasoning_ended},
    )


REASONING: dict[str, Case] = {
    "reasoning, ended by its budget": after_reasoning(thinking_token_budget=BUDGET),
    "reasoning, ended by itself": after_reasoning(
        temperature=1.0, seed=4, logit_bias={reasoning.END_ID: 8.0}
    ),
    "reasoning, ended before": after_reasoning(reasoning_ended=True),
    "reasoning, without end": after_reasoning(),
    "reasoning, nothing after": Reasoning(params(thinking_token_budget=BUDGET)),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """How two engines are made, and the cases that go there."""

    flags: Mapping[str, Any]
    cases: Mapping[str, Case]
    is_async: bool = False


# Of each kind that the scheduler or the worker keeps something for.
IN_FLIGHT = (
    "greedy",
    "seed, top_p, top_k, min_p",
    "penalties, seed",
    "min_tokens",
    "bad words",
    "stop string",
    "prompt logprobs",
    "JSON schema",
    "tool call",
    "three of one",
    "long prompt",
)
IN_FLIGHT_CASES = CASES if THOROUGH else {name: CASES[name] for name in IN_FLIGHT}
WITH_REASONING = {"reasoning_parser": reasoning.NAME}
KINDS = {
    "LoRA": Kind(adapters.FLAGS, adapters.LORA),
    "LoRA, async": Kind(adapters.FLAGS, adapters.LORA, is_async=True),
    "reasoning": Kind(WITH_REASONING, REASONING),
    "async": Kind(WITH_REASONING, IN_FLIGHT_CASES | REASONING, is_async=True),
}


@pytest.fixture(scope="module")
def kind(request: pytest.FixtureRequest, adapter: LoRARequest) -> Kind:
    kind = KINDS[request.param]
    if kind.flags is not adapters.FLAGS:
        return kind
    return replace(kind, cases=adapters.with_adapter(kind.cases, adapter))


@pytest.fixture(scope="module")
def engines(tiny_model: str, kind: Kind) -> Iterator[Pool]:
    with (
        events_that_are_over() if kind.is_async else nullcontext(),
        Pool(tiny_model, async_scheduling=kind.is_async, **kind.flags) as pool,
    ):
        assert (pool.instances[0].core.batch_queue is not None) is kind.is_async
        yield pool


@pytest.fixture(scope="module")
def unmoved(engines: Pool, kind: Kind) -> dict[str, Any]:
    return answers_of(engines, kind.cases)


def of(*kinds: str) -> pytest.MarkDecorator:
    """With engines made so; a mark of its own, for them to be booted once."""
    return pytest.mark.parametrize("kind", kinds, indirect=True)


@of("LoRA", "LoRA, async")
@pytest.mark.parametrize("name", adapters.LORA)
def test_lora(pool: Pool, kind: Kind, unmoved: dict[str, Any], name: str) -> None:
    assert seen_by_client(in_a_circle(pool, name, kind.cases[name])) == unmoved[name]


@of("reasoning", "async")
@pytest.mark.parametrize("name", REASONING)
def test_reasoning(pool: Pool, kind: Kind, unmoved: dict[str, Any], name: str) -> None:
    assert seen_by_client(in_a_circle(pool, name, kind.cases[name])) == unmoved[name]


@of("async")
@pytest.mark.parametrize("name", IN_FLIGHT_CASES)
def test_with_steps_in_flight(pool: Pool, kind: Kind, unmoved: dict[str, Any], name: str) -> None:
    assert seen_by_client(in_a_circle(pool, name, kind.cases[name])) == unmoved[name]


# ---- left out, as in ``test_left_out`` ----------------------------------------------------------


@of("LoRA")
def test_adapter_left_out(
    pool: Pool, kind: Kind, unmoved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    capturing(monkeypatch, lambda request: setattr(request, "lora_request", None))
    assert moved(pool, "LoRA", kind.cases["LoRA"]) != unmoved["LoRA"]


@of("reasoning")
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("reasoning, ended by its budget", "reasoning_parser_kwargs"),
        ("reasoning, ended before", "reasoning_ended"),
    ],
)
def test_start_of_reasoning_left_out(
    pool: Pool,
    kind: Kind,
    unmoved: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    field: str,
) -> None:
    capturing(monkeypatch, lambda request: setattr(request, field, None))
    assert moved(pool, name, kind.cases[name]) != unmoved[name]


@of("reasoning")
def test_grammar_after_reasoning_left_out(
    pool: Pool, kind: Kind, unmoved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grammar begins where the reasoning has ended, also with what it is fed again."""
    monkeypatch.setattr(imports, "replay_grammar", lambda *_: None)
    name = "reasoning, ended by its budget"
    assert moved(pool, name, kind.cases[name], at=BUDGET + 6) != unmoved[name]
