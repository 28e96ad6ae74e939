"""Which prefix blocks an engine holds: in use by requests, or idle until their room is needed.

vLLM hands out blocks that nobody named first and then idle ones, the longest unused first; a freed
request's last block goes before its first. So it is enough to know how many blocks are free: if
fewer than there are idle ones, the oldest idle ones have been handed out.

Invariants: a hash is in use or idle, never both; idle blocks are free blocks, and preempted or
finished requests hold nothing. One departure from vLLM: a block that two requests computed at the
same time is found once, not twice. This module does not know tokens or time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixCache:
    """The named blocks of one instance, and what changed since the last look."""

    __slots__ = ("_idle", "_removed", "_stored", "_users")

    def __init__(self) -> None:
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._stored: list[int] = []
        self._removed: list[int] = []

    @property
    def num_in_use(self) -> int:
        """Named blocks that requests hold."""
        return len(self._users)

    @property
    def num_idle(self) -> int:
        """Named blocks that nobody holds: free, and found if asked for."""
        return len(self._idle)

    def match(self, hashes: Sequence[int], max_blocks: int) -> tuple[int, int]:
        """Leading blocks that are here, and how many of them are idle."""
        users, idle = self._users, self._idle
        num_idle = 0
        num_found = 0
        for block_hash in hashes[:max_blocks]:
            if block_hash in idle:
                num_idle += 1
            elif block_hash not in users:
                break
            num_found += 1
        return num_found, num_idle

    def hold(self, hashes: Sequence[int]) -> None:
        """One more request uses these blocks, which are here."""
        users = self._users
        for block_hash in hashes:
            if block_hash in users:
                users[block_hash] += 1
            else:
                del self._idle[block_hash]
                users[block_hash] = 1

    def store(self, hashes: Sequence[int]) -> list[int]:
        """Name blocks that a request has in use; those whose name was free, which it now holds."""
        users, idle = self._users, self._idle
        named = [h for h in hashes if h not in users and h not in idle]
        users.update(dict.fromkeys(named, 1))
        self._stored += named
        return named

    def release(self, hashes: Sequence[int]) -> int:
        """A request does not hold these any more; how many became idle."""
        users, idle = self._users, self._idle
        num_idle = len(idle)
        for block_hash in reversed(hashes):
            left = users[block_hash] - 1
            if left:
                users[block_hash] = left
            else:
                del users[block_hash]
                idle[block_hash] = None
        return len(idle) - num_idle

    def shrink(self, num_free_blocks: int) -> None:
        """Forget the oldest idle blocks beyond the number of free ones: they have been reused."""
        idle = self._idle
        while len(idle) > num_free_blocks:
            self._removed.append(idle.popitem(last=False)[0])

    def changes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Blocks stored and blocks removed since the last call, without those that were both.

        A block stored again after it was removed is told as stored only.
        """
        stored, removed = self._stored, self._removed
        if not stored and not removed:
            return (), ()
        self._stored, self._removed = [], []
        users, idle = self._users, self._idle
        here = tuple(h for h in dict.fromkeys(stored) if h in users or h in idle)
        gone = tuple(h for h in dict.fromkeys(removed) if h not in users and h not in idle)
        return here, gone
