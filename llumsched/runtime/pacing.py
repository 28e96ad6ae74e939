"""A limit on bytes a second, kept by saying how long to wait. Knows no clock and no socket."""

from __future__ import annotations


class Pacer:
    """Spreads bytes evenly over time.

    Args:
        bytes_per_s: 0 is no limit.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0

    def delay_s(self, num_bytes: int, now_s: float) -> float:
        """How long to wait before sending ``num_bytes``, which are counted as sent then."""
        if not self._bytes_per_s:
            return 0.0
        start_s = max(now_s, self._free_at_s)
        self._free_at_s = start_s + num_bytes / self._bytes_per_s
        return start_s - now_s
