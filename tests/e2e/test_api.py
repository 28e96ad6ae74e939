"""Without a move, llumsched answers as plain vLLM does, to every kind of request."""

from __future__ import annotations

import pytest

from tests.campaigns import THOROUGH
from tests.e2e.cases import BROKEN, MISSED, REFUSED, SEVERAL, STREAMED, WHOLE, completion
from tests.e2e.client import Admin, Answer, Whole, differences, in_parallel
from tests.e2e.plain import PlainAnswers, ask, ask_alone, metric_names


@pytest.fixture(scope="module")
def answers(booted: Admin, plain: PlainAnswers) -> dict[str, Whole]:
    """All streamed cases at once, so that each shares its instance with others."""
    booted.await_idle()
    found: dict[str, Whole] = {}

    def ask_streamed(name: str) -> None:
        found[name] = booted.whole(*STREAMED[name])

    in_parallel(*(lambda name=name: ask_streamed(name) for name in STREAMED))
    return found


@pytest.mark.parametrize("name", STREAMED)
def test_streams_what_plain_vllm_streams(
    answers: dict[str, Whole], plain: PlainAnswers, name: str
) -> None:
    assert not differences(answers[name].as_dict(), plain.streamed[name].as_dict())


@pytest.fixture(scope="module")
def whole_answers(booted: Admin, plain: PlainAnswers) -> dict[str, Answer]:
    """All that are not streamed, likewise."""
    booted.await_idle()
    found: dict[str, Answer] = {}

    def ask_whole(name: str) -> None:
        found[name] = ask(booted, *WHOLE[name])

    in_parallel(*(lambda name=name: ask_whole(name) for name in WHOLE))
    return found


@pytest.mark.parametrize("name", WHOLE)
def test_answers_in_one_piece_as_plain_vllm(
    whole_answers: dict[str, Answer], plain: PlainAnswers, name: str
) -> None:
    found = whole_answers[name]
    assert found.status == 200, found
    assert not differences(list(found), list(plain.whole[name]))


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_as_plain_vllm(pool: Admin, plain: PlainAnswers, name: str) -> None:
    found = ask(pool, *REFUSED[name])
    assert 400 <= found.status < 500, found
    assert not differences(list(found), list(plain.refused[name]))


@pytest.mark.parametrize("name", MISSED)
def test_a_path_that_is_not_there_is_an_error_of_openais_shape(pool: Admin, name: str) -> None:
    found = ask(pool, *MISSED[name])
    assert found.status in (404, 405)
    assert found.body["error"]["code"] == found.status
    assert found.body["error"]["message"]


@pytest.mark.skipif(not THOROUGH, reason="belongs to test_fuzz")
@pytest.mark.parametrize("name", BROKEN)
def test_breaks_where_plain_vllm_does(pool: Admin, plain: PlainAnswers, name: str) -> None:
    found = ask_alone(pool, *BROKEN[name])
    assert found.status == 500, "mended: take it off the list"
    assert not differences(list(found), list(plain.broken[name]))


def test_streams_usage_only_if_asked(pool: Admin) -> None:
    path, body = STREAMED["greedy"]
    with_usage = pool.whole(path, body)
    without = pool.whole(path, {k: v for k, v in body.items() if k != "stream_options"})
    assert without.usage is None
    assert without.choices == with_usage.choices
    assert with_usage.usage is not None
    assert with_usage.usage["completion_tokens"] == body["max_tokens"]


def test_sequences_of_one_request_differ(plain: PlainAnswers) -> None:
    """Or else that they are put together rightly would prove nothing."""
    for name in SEVERAL:
        choices = plain.streamed[name].choices.values()
        assert len({tuple(choice["token_ids"]) for choice in choices}) == len(choices) > 1


def test_metrics_are_those_of_plain_vllm_for_each_instance(
    pool: Admin, plain: PlainAnswers
) -> None:
    def total(name: str) -> float:
        lines = pool.text("/metrics").splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))

    assert plain.metrics - metric_names(pool.text("/metrics")) == set()
    finished, tokens = total("vllm:request_success_total"), total("vllm:generation_tokens_total")
    pool.whole("/v1/completions", completion(max_tokens=8))
    pool.whole("/v1/completions", completion(max_tokens=8))
    assert total("vllm:request_success_total") == finished + 2
    assert total("vllm:generation_tokens_total") == tokens + 16
    running = [
        line
        for line in pool.text("/metrics").splitlines()
        if line.startswith("vllm:num_requests_running{")
    ]
    assert len(running) == 2, "one for each instance"


def test_requests_are_spread_over_the_instances(pool: Admin) -> None:
    with (
        pool.stream("/v1/completions", completion(max_tokens=200)) as first,
        pool.stream("/v1/completions", completion(max_tokens=200)) as second,
    ):
        next(first), next(second)
        assert {r["instance_id"] for r in pool.requests()} == set(pool.instances())
