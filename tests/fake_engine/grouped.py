"""The fake engine with a KV cache of three groups: all tokens, those of a window, and a state.

A token's cell is in a block of the first group and, until the window has left it behind, in one of
the second. The third has one block of a request, whose first cell is a digest of every token so
far: each step reads it, checks it and writes it again. So a state that was copied too early, or
not at all, is an error at the next step.
"""

from __future__ import annotations

from llumsched.core.migration.groups import CacheGroup
from llumsched.engine.base import NO_BLOCK, BlockTables, CopyableBlocks
from tests.fake_engine.engine import FakeEngine
from tests.fake_engine.request import Export, FakeRequest

WINDOW = 5


class GroupedEngine(FakeEngine):
    """Prefixes are not cached: a state is of all that came before it."""

    def __init__(self, *, num_blocks: int, block_size: int, max_steps_in_flight: int = 1) -> None:
        super().__init__(
            num_blocks=num_blocks, block_size=block_size, max_steps_in_flight=max_steps_in_flight
        )
        self._windows: dict[FakeRequest, list[int]] = {}
        self._states: dict[FakeRequest, int] = {}
        self._pinned: dict[int, BlockTables] = {}

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        settled = CacheGroup(block_size=self.block_size)
        return (settled, settled, CacheGroup(block_size=1 << 20, num_live_blocks=1))

    def check(self) -> None:
        held: list[int] = []
        for request in (*self.requests.values(), *self._imports.values()):
            for table in self._tables_of(request):
                held.extend(block_id for block_id in table if block_id != NO_BLOCK)
        for export in self._exports.values():
            held.extend(export.pinned)
        self.pool.check(held)

    # ---- blocks -----------------------------------------------------------------------------

    def _tables_of(self, request: FakeRequest) -> BlockTables:
        state = self._states.get(request)
        return (
            list(request.block_ids),
            list(self._windows.get(request, [])),
            [] if state is None else [state],
        )

    def _extend(self, request: FakeRequest, num_blocks: int) -> bool:
        window = self._windows.get(request, [])
        missing = [max(0, num_blocks - len(table)) for table in (request.block_ids, window)]
        missing.append(int(request not in self._states))
        new = self.pool.allocate(sum(missing))
        if new is None:
            return False
        request.block_ids.extend(new[: missing[0]])
        self._windows[request] = window + new[missing[0] : missing[0] + missing[1]]
        if missing[2]:
            self._states[request] = new[-1]
        return True

    def _free(self, request: FakeRequest) -> None:
        super()._free(request)
        self.pool.free([i for i in self._windows.pop(request, []) if i != NO_BLOCK])
        if request in self._states:
            self.pool.free([self._states.pop(request)])

    def _publish(self, request: FakeRequest) -> None:
        """A step is over: what the window has left behind is free."""
        window = self._windows.get(request)
        if window is None:
            return
        num_final_tokens = request.num_computed_tokens - request.num_in_flight_tokens
        for place in range(max(0, num_final_tokens - WINDOW + 1) // self.block_size):
            if window[place] != NO_BLOCK:
                self.pool.free([window[place]])
                window[place] = NO_BLOCK

    # ---- content ----------------------------------------------------------------------------

    def _write(self, request: FakeRequest, position: int) -> None:
        super()._write(request, position)
        self.pool.write(self._windows[request], position, request.token_ids[position])
        if position:
            self._check_state(request, position)
        digest = hash(tuple(request.token_ids[: position + 1]))
        state = (digest, *[None] * (self.block_size - 1))
        self.pool.set_content(self._states[request], state)

    def _read(self, request: FakeRequest, num_tokens: int) -> list[int]:
        self._check_state(request, num_tokens)
        window = self._windows[request]
        for position in range(max(0, num_tokens - WINDOW), num_tokens):
            cell = self.pool.content(window[position // self.block_size])[
                position % self.block_size
            ]
            if cell != request.token_ids[position]:
                raise AssertionError(f"position {position} was never written in its window")
        return super()._read(request, num_tokens)

    def _check_state(self, request: FakeRequest, num_tokens: int) -> None:
        digest = self.pool.content(self._states[request])[0]
        if digest != hash(tuple(request.token_ids[:num_tokens])):
            raise AssertionError(f"the state is not that after {num_tokens} tokens")

    # ---- exports ----------------------------------------------------------------------------

    def _pin(self, export: Export, num_blocks: int) -> None:
        tables = self._pinned.setdefault(id(export), ([], [], []))
        here = self._tables_of(export.request)
        for pinned, table in zip(tables[:2], here[:2], strict=True):
            self._touch(export, pinned, table[len(pinned) : num_blocks])
        if export.suspended is not None and not tables[2]:
            self._touch(export, tables[2], here[2])

    def _touch(self, export: Export, pinned: list[int], new: list[int]) -> None:
        real = [block_id for block_id in new if block_id != NO_BLOCK]
        self.pool.touch(real)
        export.pinned.extend(real)
        pinned.extend(new)

    def _copyable(self, export: Export) -> CopyableBlocks:
        tables = self._pinned.get(id(export), ([], [], []))
        return CopyableBlocks(
            block_ids=tuple(list(table) for table in tables),
            num_tokens=export.num_tokens,
            num_preemptions=export.request.num_preemptions,
        )

    def _end_export(self, request_id: str) -> Export | None:
        export = super()._end_export(request_id)
        if export is not None:
            self._pinned.pop(id(export), None)
        return export
