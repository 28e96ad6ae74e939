"""The running scheduler's decision log: notes reach the disk soon, and cost no request."""

from __future__ import annotations

import logging

from llumsched.core.actions import Action
from llumsched.core.events import Event
from llumsched.decision_log import DecisionLog

logger = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 1.0


class DecisionRecorder:
    """Writes to ``log`` until that fails; on disk at the latest ``flush_interval_s`` later."""

    def __init__(self, log: DecisionLog, flush_interval_s: float = FLUSH_INTERVAL_S) -> None:
        self._flush_interval_s = flush_interval_s
        self._log: DecisionLog | None = log
        self._flushed_s = 0.0

    def note(self, now_s: float, event: Event, actions: tuple[Action, ...]) -> None:
        """Keep a decision; what is kept reaches the disk within a second of the next one."""
        if self._log is None:
            return
        try:
            self._log.write(now_s, event, actions)
            if now_s - self._flushed_s >= self._flush_interval_s:
                self._flushed_s = now_s
                self._log.flush()
        except OSError as error:
            # A gap would make the rest useless, and no log is worth a request.
            logger.error("The decision log ends here: %s", error)
            self._log = None

    def close(self) -> None:
        """Write out what was kept."""
        if self._log is not None:
            self._log.close()
            self._log = None
