"""How long to wait before another takes the place of what has died.

The pause doubles while one after the other dies young, so that a crash loop costs little; one that
has lived for a while is replaced at once. This module does not know what died.
"""

from __future__ import annotations

FIRST_BACK_OFF_S = 1.0
MAX_BACK_OFF_S = 60.0
# One that has lived for so long did not die young.
GROWN_UP_S = 60.0
# Deaths before one that has lived for so long are history.
FORGOTTEN_S = 600.0


def pause_s(num_failures: int) -> float:
    """How long to wait after so many failures in a row."""
    return min(MAX_BACK_OFF_S, FIRST_BACK_OFF_S * 2 ** (num_failures - 1)) if num_failures else 0.0


class BackOff:
    """The deaths in one place, of those that took it one after the other."""

    def __init__(self) -> None:
        self._num_young_deaths = 0
        self.num_deaths = 0
        self.last_failure = ""

    def lives(self, lived_s: float) -> None:
        """One has served for so long; in the end, the deaths before it are forgotten."""
        if self.num_deaths and lived_s >= FORGOTTEN_S:
            self._num_young_deaths = self.num_deaths = 0
            self.last_failure = ""

    def died(self, failure: str, lived_s: float) -> float:
        """One has died.

        Args:
            lived_s: for how long it had served; 0 if it never has.

        Returns:
            how long to wait before the next is started, in seconds.
        """
        self.num_deaths += 1
        self.last_failure = failure
        self._num_young_deaths = self._num_young_deaths + 1 if lived_s < GROWN_UP_S else 0
        return pause_s(self._num_young_deaths)
