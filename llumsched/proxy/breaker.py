"""Circuit breaker: a server that failed is left alone, and tried again, each time after longer.

Closed, it counts failures in a row; at `max_failures` it opens. Open, nothing is sent until
`retry_at_s`; then the server's health is asked, and one that is well closes it.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 5.0


@dataclass(slots=True, kw_only=True)
class CircuitBreaker:
    """See the module docstring; times are seconds on one monotonic clock."""

    max_failures: int = 3
    num_failures: int = 0
    """Failures in a row."""
    num_openings: int = 0
    """Openings since the server last answered a request."""
    retry_at_s: float | None = None
    """When an open one may be tried; `None` while it is closed."""

    @property
    def is_open(self) -> bool:
        """True while nothing may be sent."""
        return self.retry_at_s is not None

    def succeeded(self) -> None:
        """A request was answered."""
        self.num_failures = self.num_openings = 0

    def failed(self, now_s: float, *, is_dead: bool = False) -> bool:
        """A request failed; true if this opens the circuit.

        Args:
            is_dead: the server was not there at all, and is not asked a second time.
        """
        self.num_failures += 1
        if self.is_open or (self.num_failures < self.max_failures and not is_dead):
            return False
        wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**self.num_openings)
        self.num_openings += 1
        self.retry_at_s = now_s + wait_s
        return True

    def may_try(self, now_s: float) -> bool:
        """True when the server's health may be asked again."""
        return self.retry_at_s is not None and now_s >= self.retry_at_s

    def unwell(self, now_s: float) -> None:
        """The server's health was asked, and it is not well."""
        self.retry_at_s = None
        self.num_failures = self.max_failures
        self.failed(now_s, is_dead=True)

    def close(self) -> None:
        """The server is well again."""
        self.retry_at_s, self.num_failures = None, 0
