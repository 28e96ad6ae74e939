"""A request that is moved while it streams answers as if it had not been."""

from __future__ import annotations

import itertools
import re

import pytest

from tests.campaigns import THOROUGH
from tests.e2e.cases import COMPLETIONS, SEVERAL, SINGLE, completion
from tests.e2e.client import Admin, Chunk, Whole, belongs, differences, in_parallel
from tests.e2e.moving import Mover, move
from tests.e2e.plain import PlainAnswers

# Tokens after which a request is sent away, and sent back: early enough to arrive before its end.
THERE_AND_BACK = (2, 12)
LONG_PROMPT = [504 + i % 997 for i in range(700)]


@pytest.mark.parametrize("name", SINGLE)
def test_there_and_back_again(pool: Admin, plain: PlainAnswers, name: str) -> None:
    mover = Mover(pool, THERE_AND_BACK)
    found = pool.whole(*SINGLE[name], on_chunk=mover)
    there, back = mover.reports
    assert (there["source"], there["destination"]) == (back["destination"], back["source"])
    assert there["num_output_tokens"] < back["num_output_tokens"]
    assert not differences(found.as_dict(), plain.streamed[name].as_dict())


def test_inside_a_batch(pool: Admin, plain: PlainAnswers) -> None:
    """Six at once, moved there and back past each other; an instance takes few at a time, so some
    may have ended before their turn."""
    names = list(SINGLE)[:6]
    found: dict[str, Whole] = {}
    movers = {name: Mover(pool, THERE_AND_BACK) for name in names}

    def ask(name: str) -> None:
        found[name] = pool.whole(*SINGLE[name], on_chunk=movers[name])

    in_parallel(*(lambda name=name: ask(name) for name in names))
    for name in names:
        assert not differences(found[name].as_dict(), plain.streamed[name].as_dict()), name
    statuses = [answer.status for mover in movers.values() for answer in mover.answers]
    assert set(statuses) <= {200, 404}, statuses
    assert statuses.count(200) >= len(names), statuses


@pytest.mark.parametrize("name", SEVERAL)
def test_each_sequence_of_a_request_moves(pool: Admin, plain: PlainAnswers, name: str) -> None:
    path, body = SEVERAL[name]
    num_sequences = len(plain.streamed[name].choices)
    seen: set[int] = set()
    moved: list[str] = []

    def move_all(_number: int, chunk: Chunk) -> None:
        seen.update(choice["index"] for choice in chunk["choices"])
        if moved or len(seen) < num_sequences:
            return
        ambiguous = pool.migrate(chunk["id"])
        sequences = [r["request_id"] for r in pool.requests() if belongs(r, chunk["id"])]
        assert len(sequences) == num_sequences
        assert ambiguous.status == 409
        assert all(s in ambiguous.body["error"]["message"] for s in sequences)
        for sequence in sequences:
            answer = move(pool, sequence)
            assert answer.status == 200, answer
            moved.append(answer.body["request_id"])
        assert sorted(moved) == sorted(sequences)

    found = pool.whole(path, body, on_chunk=move_all)
    assert len(moved) == num_sequences
    assert not differences(found.as_dict(), plain.streamed[name].as_dict())


def test_long_prompt_moves_in_stages_and_its_cached_blocks_stay(pool: Admin) -> None:
    body = completion(prompt=LONG_PROMPT)
    mover = Mover(pool, THERE_AND_BACK)
    found = pool.whole(COMPLETIONS, body, on_chunk=mover)
    expected = pool.whole(COMPLETIONS, body)
    there, back = mover.reports
    num_prompt_blocks = len(LONG_PROMPT) // 32
    assert there["num_stages"] >= 2
    assert there["num_blocks"] + there["num_cached_blocks"] > num_prompt_blocks
    # The instance that it left and comes back to still has the prompt.
    assert back["num_cached_blocks"] >= num_prompt_blocks
    assert back["num_bytes"] < there["num_bytes"]
    assert not differences(found.as_dict()["choices"], expected.as_dict()["choices"])


def test_moved_again_and_again(pool: Admin) -> None:
    num_moves = 30
    path, body = COMPLETIONS, completion(max_tokens=8 * num_moves, temperature=0.9, seed=21)
    mover = Mover(pool, tuple(range(2, 2 + num_moves)))
    found = pool.whole(path, body, on_chunk=mover)
    reports = mover.reports
    assert len(reports) == num_moves
    for before, after in itertools.pairwise(reports):
        assert before["destination"] == after["source"]
    expected = pool.whole(path, body)
    assert not differences(found.as_dict(), expected.as_dict())


@pytest.fixture(scope="module")
def text_after(booted: Admin) -> dict[int, str]:
    """The text of the greedy case after each number of tokens."""
    texts: dict[int, str] = {}
    num_tokens, text = 0, ""
    with booted.stream(COMPLETIONS, completion(stream_options=None)) as stream:
        for chunk in stream:
            num_tokens += len(chunk["choices"][0]["token_ids"])
            text += chunk["choices"][0]["text"]
            texts[num_tokens] = text
    return texts


@pytest.mark.parametrize("num_tokens_on_the_way", range(0, 12, 1 if THOROUGH else 4))
def test_stop_string_found_while_moving(
    pool: Admin, text_after: dict[int, str], num_tokens_on_the_way: int
) -> None:
    """The frontend finds it and aborts the request, wherever that is by then."""
    num_tokens_before = 4
    text = text_after[num_tokens_before + num_tokens_on_the_way]
    stop = text[-10:]
    body = completion(stop=[stop])
    mover = Mover(pool, at=(num_tokens_before,))
    found = pool.whole(COMPLETIONS, body, on_chunk=mover)
    # A move that comes too late is refused, and one under way is given up.
    assert mover.answers[0].status in (200, 404, 409)
    expected = pool.whole(COMPLETIONS, body)
    assert expected.text == text[: text.index(stop)]
    assert not differences(found.as_dict(), expected.as_dict())


def test_an_idle_session_moves_and_its_next_turn_finds_it_there(pool: Admin) -> None:
    session = {"x-session-id": "of-a-patient-user"}
    past = [211 + i % 499 for i in range(200)]
    body = {"model": pool.model, "prompt": past, "max_tokens": 4, "temperature": 0}
    first = pool.post(COMPLETIONS, body, session)
    assert first.status == 200, first
    moved = pool.post("/llumsched/migrations", {"session_id": session["x-session-id"]})
    assert moved.status == 200, moved
    assert moved.body["source"] != moved.body["destination"]

    num_hits = _cached_tokens(pool)
    again = pool.post(COMPLETIONS, {**body, "prompt": [*past, 7, 8, 9]}, session)
    assert again.status == 200, again
    # Full blocks of 32 tokens.
    assert (
        _cached_tokens(pool)[moved.body["destination"]] == num_hits[moved.body["destination"]] + 192
    )


def _cached_tokens(pool: Admin) -> dict[str, float]:
    """Prompt tokens that were found in the cache of each instance, so far."""
    hits = re.compile(r'^vllm:prefix_cache_hits_total\{.*engine="(\d+)".*\} (\S+)$', re.MULTILINE)
    return {f"instance-{n}": float(hit) for n, hit in hits.findall(pool.text("/metrics"))}
