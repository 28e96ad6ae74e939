"""The global scheduler under the name that plug-ins and notebooks import.

The code is in ``llumsched.core.scheduling``; this name stays.
"""

from __future__ import annotations

from llumsched.core.scheduling.scheduler import GlobalScheduler

__all__ = ["GlobalScheduler"]
