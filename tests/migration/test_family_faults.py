"""Faults at every state, as in ``test_faults``, while requests of other families move.

The tests are those of that module, on the engines of ``test_families``.
"""

from __future__ import annotations

from tests.migration.test_families import pool, unmoved
from tests.migration.test_faults import (
    at,
    hurried,
    test_a_client_leaves_at_every_state,
    test_an_engine_hangs,
    test_an_instance_dies,
)

__all__ = [
    "at",
    "hurried",
    "pool",
    "test_a_client_leaves_at_every_state",
    "test_an_engine_hangs",
    "test_an_instance_dies",
    "unmoved",
]
