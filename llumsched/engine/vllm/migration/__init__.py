"""Both sides of a live migration on stock vLLM, over one engine.

The two meet only in what they know of a request's history (``port``): one that has come here by a
migration may leave by the next.
"""

from __future__ import annotations

from llumsched.engine.vllm.migration.exports import SourceAdapter
from llumsched.engine.vllm.migration.imports import HAND_OVER_CALL_ID, DestinationAdapter

__all__ = ["HAND_OVER_CALL_ID", "MigrationAdapter"]


class MigrationAdapter(SourceAdapter, DestinationAdapter):
    """Exports and imports of one engine, which implements ``engine.base.MigrationEngine``."""
