"""How the stays of a request are numbered.

A *stay* is the time that a request spends at one instance. Instances count them: a migration makes
the next. When an instance dies, the frontend alone decides from where the request goes on, and
begins a new *series*, numbered beyond every move that any instance may still announce.

Invariant: of two stays of a request the one with the higher number is the later one, whoever
numbered it. Hence copies of a request that a dead instance left behind are told from the request
itself. Nothing here knows instances or tokens.
"""

from __future__ import annotations

# More moves than a request can make.
PLACEMENTS_PER_EPOCH = 1 << 20


def epoch_of(placement_number: int) -> int:
    """How often the request was resumed before this stay."""
    return placement_number // PLACEMENTS_PER_EPOCH


def first_placement_number(series: int) -> int:
    """The number of the first stay of a series."""
    return series * PLACEMENTS_PER_EPOCH


def num_moves_within(placement_number: int) -> int:
    """How often the request has migrated since it was last resumed."""
    return placement_number % PLACEMENTS_PER_EPOCH
