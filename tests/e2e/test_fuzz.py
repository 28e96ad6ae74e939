"""Bodies of every kind for the server's own description of its API: no 5xx, and nothing is left.

Schemathesis makes bodies that fit the description, and bodies that do not. Few of either come far:
most fail at the first field. So a second test breaks one field of a request that is right. What a
request may cost is bounded here, for a client with a key may ask for as much as the server has.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, cast

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.schemas import BaseSchema

from tests.campaigns import THOROUGH, examples
from tests.e2e.cases import CHAT, COMPLETIONS, breaks_plain_vllm
from tests.e2e.client import REQUEST_TIMEOUT_S, Admin

# They do what they say; tests/frontend/test_admin_fuzz.py has them without instances.
DESTRUCTIVE = (
    "/llumsched/scale",
    "/llumsched/instances/{instance_id}/drain",
    "/scale_elastic_ep",
)
pytestmark = pytest.mark.skipif(not THOROUGH, reason="takes minutes; tests/frontend has another")
NUM_EXAMPLES = 50
NUM_BROKEN = 400

MAX_TOKENS = 4
BOUNDS = {"max_tokens": MAX_TOKENS, "max_completion_tokens": MAX_TOKENS, "n": 2, "best_of": 2}
REQUESTS: Mapping[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Once upon a time", "max_tokens": MAX_TOKENS},
    CHAT: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": MAX_TOKENS},
}

# Beyond 64 bits vLLM cannot send a number to its engine, and answers 500.
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**31, -(2**63), 2**64 - 1, 1e308, -1e-308, 0.5]),
    st.text(max_size=8),
    st.lists(st.integers() | st.text(max_size=4) | st.none(), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers() | st.none(), max_size=2),
)

campaign = settings(
    max_examples=examples(NUM_EXAMPLES),
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def schema(booted: Admin) -> BaseSchema:
    found: BaseSchema = schemathesis.openapi.from_dict(booted.get("/openapi.json").body)
    return found


def operations(schema: BaseSchema) -> Iterator[Any]:
    """Operations to try: all that are served, but for those that would end instances."""
    for result in schema.get_all_operations():
        operation = cast("Any", result).ok()
        if operation.path not in DESTRUCTIVE:
            yield operation


def affordable(body: Any, model: str) -> Any:
    """The body, for the model that is there and with few tokens to be computed."""
    if not isinstance(body, dict):
        return body
    bounded = {"max_tokens": MAX_TOKENS, **body, "model": model}
    for name, bound in BOUNDS.items():
        value = bounded.get(name, 0)
        if value is None or (isinstance(value, int | float) and value > bound):
            bounded[name] = bound
    return bounded


def why_bad(response: Any) -> str | None:
    """The fault of an answer, whatever was asked."""
    if response.status_code == 503 and "Retry-After" in response.headers:
        return None
    if response.status_code == HTTPStatus.NOT_IMPLEMENTED:
        return None  # what this model cannot do
    if response.status_code >= 500:
        return f"{response.status_code} {response.text[:500]}"
    if response.status_code == 200 and '"code": 500' in response.text:
        return f"an error in the stream: {response.text[:500]}"
    return None


def test_the_described_api(pool: Admin, schema: BaseSchema) -> None:
    url = str(pool._http.base_url)
    num_asked = 0
    failures = []
    for operation in operations(schema):
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:

            @campaign
            @given(operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                nonlocal num_asked
                case.body = affordable(case.body, pool.model)
                response = case.call(base_url=url, timeout=REQUEST_TIMEOUT_S)
                num_asked += 1
                bad = why_bad(response)
                if bad is not None and not breaks_plain_vllm(case.body):
                    failures.append(f"{case.method} {case.path} {case.body!r}: {bad}")

            with contextlib.suppress(Unsatisfiable):  # some have nothing to get wrong
                ask()
    assert not failures, "\n".join(failures)
    assert num_asked > NUM_EXAMPLES


@pytest.mark.parametrize("path", REQUESTS)
def test_one_field_that_is_wrong(pool: Admin, schema: BaseSchema, path: str) -> None:
    reference = schema[path]["post"].definition.raw["requestBody"]["content"]["application/json"]
    name = reference["schema"]["$ref"].rsplit("/", 1)[1]
    fields = sorted(schema.raw_schema["components"]["schemas"][name]["properties"])
    url = str(pool._http.base_url).rstrip("/") + path
    failures = []

    @settings(campaign, max_examples=examples(NUM_BROKEN))
    @given(st.sampled_from(fields), JUNK)
    def ask(field: str, value: Any) -> None:
        body = affordable({**REQUESTS[path], field: value}, pool.model)
        response = requests.post(url, json=body, timeout=REQUEST_TIMEOUT_S)
        bad = why_bad(response)
        if bad is not None and not breaks_plain_vllm(body):
            failures.append(f"{json.dumps({field: value})}: {bad}")

    ask()
    assert not failures, "\n".join(failures)
