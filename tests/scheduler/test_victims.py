"""The source's choice of the request that moves, whatever its policy does."""

from __future__ import annotations

from collections.abc import Sequence

from llumsched.core.policy import MigrationCandidate
from llumsched.instance.llumlet import choose_victims

CANDIDATES = [MigrationCandidate(request_id=name, num_blocks=3) for name in "abc"]


class Backwards:
    def choose(self, candidates: Sequence[MigrationCandidate]) -> Sequence[MigrationCandidate]:
        return [MigrationCandidate(request_id="made up", num_blocks=1), *reversed(candidates)]


class Raises:
    def choose(self, candidates: Sequence[MigrationCandidate]) -> Sequence[MigrationCandidate]:
        raise RuntimeError("a bug")


def test_the_policys_order_less_what_it_made_up() -> None:
    assert choose_victims(Backwards(), CANDIDATES) == CANDIDATES[::-1]


def test_a_policy_that_raises_does_not_stop_the_instance() -> None:
    assert choose_victims(Raises(), CANDIDATES) == CANDIDATES
