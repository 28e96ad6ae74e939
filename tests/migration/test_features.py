"""What has to be switched on: LoRA, reasoning, asynchronous scheduling. Exact there as well.

The engines are of a tiny model, and boot in no time. LoRA has engines of its own: on a CPU vLLM
answers otherwise for requests that share a batch with those of an adapter, moved or not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from llumsched.engine.vllm import imports
from tests.campaigns import THOROUGH
from tests.migration import reasoning
from tests.migration.answers import seen_by_client
from tests.migration.cases import CASES, Case, params
from tests.migration.leaving_out import capturing, moved
from tests.migration.pool import Pool, events_that_are_over
from tests.migration.ways import answers_of, in_a_circle

# Engines of other kinds: after them those of the other tests here no longer answer.
pytestmark = pytest.mark.skipif(not THOROUGH, reason="boots engines of other kinds")

RANK = 8
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


LORA: dict[str, Case] = {
    "LoRA": Case(params()),
    "LoRA, seed": Case(params(temperature=0.8, seed=6)),
    "LoRA, long prompt": Case(params(), is_long=True),
}
REASONING: dict[str, Case] = {
    "reasoning, ended by its budget": after_reasoning(thinking_token_budget=BUDGET),
    "reasoning, ended by itself": after_reasoning(
        temperature=1.0, seed=4, logit_bias={reasoning.END_ID: 8.0}
    ),
    "reasoning, ended before": after_reasoning(reasoning_ended=True),
    "reasoning, without end": after_reasoning(),
    "reasoning, nothing after": Reasoning(params(thinking_token_budget=BUDGET)),
}


@pytest.fixture(scope="module")
def adapter(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> LoRARequest:
    """A LoRA adapter of random weights, large enough to change what the model says."""
    folder = tmp_path_factory.mktemp("adapter")
    config = json.loads((Path(tiny_model) / "config.json").read_text())
    num_in, head_size = config["hidden_size"], config["head_dim"]
    num_out = {
        "q_proj": config["num_attention_heads"] * head_size,
        "v_proj": config["num_key_value_heads"] * head_size,
    }
    random = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in num_out.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (RANK, num_in)), ("lora_B", (size, RANK))):
                weights[f"{prefix}.{part}.weight"] = torch.randn(shape, generator=random) * 0.2
    save_file(weights, folder / "adapter_model.safetensors")
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(num_out),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config))
    return LoRARequest("of the tests", 1, str(folder))


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
WITH_LORA = {"enable_lora": True, "max_lora_rank": RANK}
WITH_REASONING = {"reasoning_parser": reasoning.NAME}
KINDS = {
    "LoRA": Kind(WITH_LORA, LORA),
    "LoRA, async": Kind(WITH_LORA, LORA, is_async=True),
    "reasoning": Kind(WITH_REASONING, REASONING),
    "async": Kind(WITH_REASONING, IN_FLIGHT_CASES | REASONING, is_async=True),
}


@pytest.fixture(scope="module")
def kind(request: pytest.FixtureRequest, adapter: LoRARequest) -> Kind:
    kind = KINDS[request.param]
    if kind.flags is not WITH_LORA:
        return kind
    cases = {
        name: replace(case, fields={"lora_request": adapter}) for name, case in kind.cases.items()
    }
    return replace(kind, cases=cases)


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
@pytest.mark.parametrize("name", LORA)
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
