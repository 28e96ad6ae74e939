"""Nobody gets far ahead: for any requests, two clients that both wait are served alike."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from llumsched.core.scheduling.fairness import OUTPUT_TOKEN_WEIGHT, PROMPT_TOKEN_WEIGHT, FairTurns

LENGTHS = st.lists(st.integers(min_value=1, max_value=500), min_size=1, max_size=30)


@given(LENGTHS, LENGTHS)
def test_what_two_waiting_clients_had_differs_by_two_requests_at_most(
    of_a: list[int], of_b: list[int]
) -> None:
    """The bound of start-time fair queueing: the longest request of the one and of the other."""
    turns = FairTurns()
    queue = [(turns.tag("a", n), index, "a", n) for index, n in enumerate(of_a)]
    queue += [(turns.tag("b", n), index, "b", n) for index, n in enumerate(of_b, len(of_a))]
    served = {"a": 0, "b": 0}
    left = {"a": len(of_a), "b": len(of_b)}
    for tag, _, client, num_tokens in sorted(queue):
        turns.began(tag)
        served[client] += num_tokens
        left[client] -= 1
        if all(left.values()):
            assert abs(served["a"] - served["b"]) <= max(of_a) + max(of_b)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.integers(0, 99)), max_size=40))
def test_going_on_from_a_checkpoint_changes_nothing(events: list[tuple[str | None, int]]) -> None:
    turns = FairTurns()
    for client, num_tokens in events:
        turns.began(turns.tag(client, num_tokens) / 2)
        turns.ended(client, num_tokens)
    again = FairTurns()
    again.restore(turns.state())
    for client in ("a", "b", None, "new"):
        assert again.tag(client, 1) == turns.tag(client, 1)


def test_who_was_away_has_saved_up_nothing() -> None:
    turns = FairTurns()
    for _ in range(10):
        turns.began(turns.tag("busy", 100))
    assert turns.tag("back", 100) == 900 * PROMPT_TOKEN_WEIGHT
    assert turns.tag("busy", 100) == 1000 * PROMPT_TOKEN_WEIGHT


def test_outputs_count() -> None:
    turns = FairTurns()
    turns.tag("a", 10)
    turns.ended("a", 5)
    assert turns.tag("a", 10) == 10 * PROMPT_TOKEN_WEIGHT + 5 * OUTPUT_TOKEN_WEIGHT


def test_a_million_clients_are_not_all_remembered() -> None:
    turns = FairTurns()
    for client in range(5000):
        turns.began(turns.tag(str(client), 1) + client)
    assert len(turns.state()["charged_until"]) < 2100
