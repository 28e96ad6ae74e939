"""Schemas and grammars that no answer satisfies are the client's mistake; all others pass."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.testclient import TestClient
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from llumsched.frontend.request.answerable import refuse_what_has_no_answer
from llumsched.frontend.request.rejection import refused
from tests.builders import engine_request
from tests.frontend.engines import engine_that, taken
from tests.frontend.test_overload import as_vllm_streams, served

ITSELF = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
TREE = {
    "type": "object",
    "properties": {
        "value": {"type": "string", "pattern": 'a{2,4}[x-z"]+'},
        "children": {"type": "array", "items": {"$ref": "#"}, "minItems": 2},
    },
    "required": ["value"],
}
NO_ANSWER: dict[str, dict[str, Any]] = {
    "a reference to itself": {"json": {"$ref": "#"}},
    "a definition that is itself": {"json": ITSELF},
    "the same as text": {"json": json.dumps(ITSELF)},
    "two that are each other": {
        "json": {
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
            "$ref": "#/$defs/a",
        }
    },
    "a choice of itself": {"json": {"anyOf": [{"$ref": "#"}]}},
    "in a property that is required": {
        "json": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "a": {"$ref": "#/$defs/a"}},
            "required": ["a"],
            "$defs": ITSELF["$defs"],
        }
    },
    "a rule that is itself": {"grammar": "root ::= root"},
    "rules that are each other": {"grammar": "root ::= a\na ::= b\nb ::= a"},
    "of Lark": {"grammar": "start: start\n"},
}
ANSWERED: dict[str, dict[str, Any]] = {
    "a tree": {"json": TREE},
    "itself or nothing": {"json": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "an object of its kind for ever": {
        "json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    },
    "left recursion": {"grammar": 'root ::= root "a" | "a"'},
    "letters for ever": {"grammar": "root ::= [a-z] root"},
    "a bar and a bracket in a literal": {"grammar": 'root ::= "a|b" root | "c(=" '},
    "what cannot be reached": {"grammar": 'root ::= "a" (b | c)*\nb ::= b\nc ::= "x"'},
    "a choice": {"choice": ["yes", "no"]},
    "what vLLM says better": {"json": {"$ref": "#/nowhere"}},
    "no JSON": {"json": "{"},
    "no grammar": {"grammar": "%%%"},
}


@pytest.mark.parametrize("name", NO_ANSWER)
def test_what_no_answer_satisfies_is_a_400(name: str) -> None:
    with pytest.raises(VLLMValidationError, match="defined only by itself") as refusal:
        refuse_what_has_no_answer(StructuredOutputsParams(**NO_ANSWER[name]))
    assert refusal.value.parameter in ("json", "grammar")


@pytest.mark.parametrize("name", ANSWERED)
def test_what_has_an_answer_passes(name: str) -> None:
    refuse_what_has_no_answer(StructuredOutputsParams(**ANSWERED[name]))


def test_it_is_refused_before_anything_is_kept_of_it() -> None:
    async def scenario() -> None:
        engine = engine_that(taken)
        request = engine_request(
            sampling_params=SamplingParams(
                structured_outputs=StructuredOutputsParams(json={"$ref": "#"})
            )
        )
        nobody: Any = None
        with pytest.raises(VLLMValidationError):
            await engine._add_request(request, None, None, 0, nobody)
        assert not engine.output_processor.request_states

    asyncio.run(scenario())


def test_a_stream_with_a_mistake_is_answered_as_any_other_request() -> None:
    """Not with status 200 and an event, as the engine's client comes after the head."""

    async def place() -> None:
        mistake = VLLMValidationError("json: no answer satisfies it", parameter="json")
        refused(mistake)
        raise mistake

    answer = TestClient(served(lambda: as_vllm_streams(place))).post("/")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "json"
    assert "retry-after" not in answer.headers
