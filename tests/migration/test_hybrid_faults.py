"""Faults at each state of a migration, and many moves, of a model with attention and states."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pytest

from tests.campaigns import THOROUGH
from tests.migration import test_faults
from tests.migration.pool import Pool
from tests.migration.test_families_alone import engines, unmoved  # noqa: F401
from tests.migration.test_faults import at, hurried  # noqa: F401
from tests.migration.test_soak import many_migrations

pytestmark = pytest.mark.parametrize("alone_family", ["Granite 4"], indirect=True)

test_an_engine_hangs = test_faults.test_an_engine_hangs
if THOROUGH:
    test_an_instance_dies = test_faults.test_an_instance_dies
    test_a_link_is_cut = test_faults.test_the_link_is_cut_for_a_while
    test_messages = test_faults.test_messages_lost_doubled_late_and_reordered
    test_a_client_leaves = test_faults.test_a_client_leaves_at_every_state


def test_nothing_is_left_of_moves(pool: Pool, alone_unmoved: Mapping[str, Any]) -> None:
    """``LLUMSCHED_MIGRATIONS=1000`` for a thousand."""
    pool.configure()
    many_migrations(pool, alone_unmoved, int(os.environ.get("LLUMSCHED_MIGRATIONS", "12")))
