"""Limits on what migrations take from others: bytes a second of the network, and a share of a core.

Kept by saying how long to wait. Knows no clock and no socket.
"""

from __future__ import annotations


class RateLimiter:
    """Spreads bytes and copying evenly over time.

    Args:
        bytes_per_s: 0 is no limit.
        core_share: of one core's time that copying may take, above 0; 1 is no limit.
    """

    def __init__(self, bytes_per_s: float, core_share: float = 1.0) -> None:
        self._bytes_per_s = bytes_per_s
        self._rest_per_copying = 1.0 / core_share - 1.0
        self._link_free_at_s = 0.0
        self._core_free_at_s = 0.0

    def delay_s(self, num_bytes: int, now_s: float) -> float:
        """How long to wait before copying ``num_bytes``, which are counted as sent then."""
        start_s = max(now_s, self._link_free_at_s, self._core_free_at_s)
        if self._bytes_per_s:
            self._link_free_at_s = start_s + num_bytes / self._bytes_per_s
        return start_s - now_s

    def copied(self, core_s: float, now_s: float) -> None:
        """Copying has just taken a core for ``core_s``: what comes next waits for longer."""
        self._core_free_at_s = max(now_s, self._core_free_at_s) + core_s * self._rest_per_copying
