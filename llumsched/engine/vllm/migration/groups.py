"""A request's blocks in the groups of vLLM's KV cache: read where it leaves, held where it arrives.

Of vLLM's managers, one a group, those of attention fill a table of blocks in the order of tokens;
what a sliding window or a chunk has left behind is vLLM's null block from then on. Those of Mamba,
which are those of all state-space and linear attention and short convolutions, keep a request's
state in one block: without prefix caching the only one, with it that at the request's last token.

Invariant: a block that is held here is not zeroed by the worker until it is the request's own.
What this does not know: messages, and who the other side is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import Request

from llumsched.core.migration.groups import CacheGroup, order_of
from llumsched.engine.base import NO_BLOCK, BlockTables, CannotMigrate, Refusal
from llumsched.engine.vllm.compat import accepted

# Blocks of these are filled in order and not written again once they are full. Of kinds derived
# from them nothing is known: R-SWA drops blocks from the middle, and attention sinks share some.
SETTLED_SPECS = (
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    ChunkedLocalAttentionSpec,
)
LIVE_SPECS = (MambaSpec,)
# Of states, by vLLM's name, those that have been moved between engines without a change of tokens.
MOVING_STATES = frozenset({"MAMBA2", "GDN_ATTN", "SHORT_CONV"})

# Blocks reserved beyond the request's own tokens, in each group that grows with them, so that what
# it decodes while being copied rarely needs more room at the last stage.
RESERVED_GROWTH_BLOCKS = 2


def why_groups_cannot_move(config: KVCacheConfig) -> str | None:
    """The reason why blocks of a cache cannot be copied one by one, or ``None``."""
    if not config.kv_cache_groups:
        return "the model has no KV cache"
    for group in config.kv_cache_groups:
        if group.host_resident:
            return "a part of the model's KV cache is in host memory"
        whole = group.kv_cache_spec
        specs = [whole]
        if isinstance(whole, UniformTypeKVCacheSpecs):
            specs = list(whole.kv_cache_specs.values())
        for spec in specs:
            if type(spec) not in SETTLED_SPECS + LIVE_SPECS:
                name = type(spec).__name__
                return f"the model's KV cache is of a kind that does not move ({name})"
            if isinstance(spec, MambaSpec) and (reason := _why_state_stays(spec)) is not None:
                return reason
    return None


def _why_state_stays(spec: MambaSpec) -> str | None:
    if spec.mamba_type.name not in MOVING_STATES:
        return f"moves of a model with states of this kind are not proven ({spec.mamba_type.name})"
    if spec.mamba_cache_mode != "none" and spec.num_prefill_checkpoint_blocks:
        return (
            "moves of a model with states are not proven where those from within a prompt are kept "
            "for others (--no-enable-prefix-caching)"
        )
    if spec.num_speculative_blocks:
        return "under speculative decoding a request has a state for each draft"
    return None


def cache_groups(kv_manager: KVCacheManager) -> tuple[CacheGroup, ...]:
    """The groups of a cache, in vLLM's order."""
    return tuple(
        CacheGroup(block_size=manager.block_size, num_live_blocks=int(_is_live(manager)))
        for manager in kv_manager.coordinator.single_type_managers
    )


def num_blocks_of(kv_manager: KVCacheManager, num_tokens: int) -> int:
    """Blocks that a request of so many tokens holds, over all groups."""
    return sum(
        1
        if _is_live(manager)
        else -(-num_tokens // manager.block_size)
        - max(0, manager.get_num_skipped_tokens(num_tokens)) // manager.block_size
        for manager in kv_manager.coordinator.single_type_managers
    )


def has_whole_prefixes(kv_manager: KVCacheManager) -> bool:
    """True if what is cached of a request is all that it had, in every group."""
    return not any(
        _is_live(manager) or manager.get_num_skipped_tokens(1 << 30) > 0
        for manager in kv_manager.coordinator.single_type_managers
    )


def _is_live(manager: Any) -> bool:
    return isinstance(manager.kv_cache_spec, LIVE_SPECS)


class PinnedBlocks:
    """Blocks of a request that leaves: their reference counts are raised, until ``unpin``.

    Args:
        num_tokens: computed tokens of the request when it was captured. What no window holds any
            more by then is not pinned, and the destination has no place for it.
    """

    def __init__(self, kv_manager: KVCacheManager, request: Request, num_tokens: int) -> None:
        self._pool = kv_manager.block_pool
        self._request_id = request.request_id
        self._managers = kv_manager.coordinator.single_type_managers
        self._num_skipped = [
            max(0, manager.get_num_skipped_tokens(num_tokens)) // manager.block_size
            for manager in self._managers
        ]
        self._tables: list[list[KVCacheBlock | None]] = [[] for _ in self._managers]
        self.num_tokens = 0

    def pin_cached(self, blocks: Sequence[Sequence[KVCacheBlock]], num_tokens: int) -> None:
        """Pin blocks that so many tokens have filled, of a request that holds none any more."""
        self.num_tokens = num_tokens
        for index, table in enumerate(blocks):
            self._pool.touch(table)
            self._tables[index] = list(table)

    def pin_full(self, num_tokens: int) -> None:
        """Pin, besides those pinned before, the blocks that so many tokens fill."""
        self.num_tokens = num_tokens
        for index, manager in enumerate(self._managers):
            if not _is_live(manager):
                self._pin(index, num_tokens // manager.block_size)

    def pin_all(self, num_tokens: int) -> None:
        """Pin all that a request of so many tokens has, states and blocks that are not full too."""
        self.num_tokens = num_tokens
        for index, manager in enumerate(self._managers):
            if _is_live(manager):
                state = manager.req_to_blocks[self._request_id][
                    _place_of_state(manager, num_tokens)
                ]
                self._pool.touch([state])
                self._tables[index] = [state]
            else:
                self._pin(index, -(-num_tokens // manager.block_size))

    def _pin(self, index: int, num_blocks: int) -> None:
        table = self._tables[index]
        blocks = self._managers[index].req_to_blocks[self._request_id]
        for place in range(len(table), num_blocks):
            block = blocks[place]
            if block.is_null or place < self._num_skipped[index]:
                table.append(None)
            else:
                self._pool.touch([block])
                table.append(block)

    @property
    def block_ids(self) -> BlockTables:
        """Ids of what is pinned."""
        return tuple(
            [NO_BLOCK if block is None else block.block_id for block in table]
            for table in self._tables
        )

    def unpin(self) -> None:
        """Let go of all of them; the tails are evicted first, as of a request that ends."""
        for table in self._tables:
            self._pool.free_blocks(block for block in reversed(table) if block is not None)
            table.clear()


class ArrivingBlocks:
    """Blocks held for requests that arrive, in one engine's cache."""

    def __init__(self, kv_manager: KVCacheManager) -> None:
        self._kv_manager = kv_manager
        self._managers = kv_manager.coordinator.single_type_managers
        self._order = order_of(cache_groups(kv_manager))

    def hold(self, request: Request, max_tokens: int, *, num_more_tokens: int = 0) -> int:
        """Hold blocks for a request's tokens and some more; returns how many, in the order of the
        groups, have content already.

        Args:
            max_tokens: as many as a request may have.
            num_more_tokens: tokens to have room for besides, if there is room for them.

        Raises:
            CannotMigrate: if there is no room; nothing is held then.
        """
        num_tokens = request.num_tokens - 1
        hits, num_hit_tokens = self._hits(request)
        num_groups = len(self._managers)
        allocated = self._kv_manager.allocate_slots(
            request,
            0,
            num_new_computed_tokens=num_hit_tokens,
            new_computed_blocks=self._kv_manager.create_kv_cache_blocks(hits),
            num_external_computed_tokens=num_tokens - num_hit_tokens,
            delay_cache_blocks=True,
            has_scheduled_reqs=False,
            **accepted(
                self._kv_manager.allocate_slots, skip_zeroing_group_ids=tuple(range(num_groups))
            ),
        )
        if allocated is None:
            raise self._no_room(request.num_tokens)
        try:
            self._make_room(request, 0, max_tokens)
        except CannotMigrate:
            self._kv_manager.free(request)
            raise
        with suppress(CannotMigrate):
            self._make_room(request, num_more_tokens, max_tokens)
        self._leave_content(request)
        return self._order.num_settled(num_hit_tokens)

    def _make_room(self, request: Request, num_more_tokens: int, max_tokens: int) -> None:
        for manager in self._managers:
            num_blocks = -(-request.num_tokens // manager.block_size) + RESERVED_GROWTH_BLOCKS
            num_blocks += num_more_tokens // manager.block_size
            self._grow([manager], request, min(num_blocks * manager.block_size, max_tokens))

    def grow(self, request: Request, num_tokens: int) -> None:
        """Hold blocks for so many tokens.

        Raises:
            CannotMigrate: if there is no room; what is held stays.
        """
        self._grow(self._managers, request, num_tokens)
        self._leave_content(request)

    def _grow(self, managers: Sequence[Any], request: Request, num_tokens: int) -> None:
        growing = [manager for manager in managers if not _is_live(manager)]
        num_missing = sum(
            max(
                0,
                -(-num_tokens // manager.block_size)
                - len(manager.req_to_blocks[request.request_id]),
            )
            for manager in growing
        )
        if num_missing > self._kv_manager.block_pool.get_num_free_blocks():
            raise self._no_room(num_tokens)
        for manager in growing:
            manager.allocate_new_blocks(request.request_id, num_tokens, num_tokens)

    def _no_room(self, num_tokens: int) -> CannotMigrate:
        return CannotMigrate(
            f"the destination has {self._kv_manager.block_pool.get_num_free_blocks()} free blocks, "
            f"the request needs {num_blocks_of(self._kv_manager, num_tokens)}",
            Refusal.NO_ROOM,
        )

    def _hits(self, request: Request) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Full blocks of the request that are cached here, and how many tokens they cover.

        A state is not taken from the cache, since steps write to it. So a prefix is as long as
        attention has it, whatever states there are.
        """
        manager, coordinator = self._kv_manager, self._kv_manager.coordinator
        per_group = getattr(coordinator, "find_longest_cache_hit_per_group", None)
        if per_group is not None and manager.prefix_cache_lookup_enabled(request):
            found, lengths = per_group(request.block_hashes, request.num_tokens - 1)
        else:
            cached, length, *_ = manager.get_computed_blocks(request)
            found, lengths = cached.blocks, [length] * len(self._managers)
        num_tokens = min(
            (
                length
                for length, manager in zip(lengths, self._managers, strict=True)
                if not _is_live(manager)
            ),
            default=0,
        )
        num_tokens -= num_tokens % self._order.period
        hits = tuple(
            [] if _is_live(manager) else list(blocks[: num_tokens // manager.block_size])
            for blocks, manager in zip(found, self._managers, strict=True)
        )
        return hits, num_tokens

    def _leave_content(self, request: Request) -> None:
        """Keep the next step from zeroing the request's blocks, for their content comes before."""
        if not self._kv_manager.kv_cache_config.needs_kv_cache_zeroing:
            return
        held = {
            block.block_id
            for manager in self._managers
            for block in manager.req_to_blocks[request.request_id]
        }
        for manager in self._managers:
            manager.new_block_ids = [i for i in manager.new_block_ids if i not in held]

    def block_ids(self, request: Request) -> BlockTables:
        """Ids of the blocks that are held, as the port has them."""
        tables = []
        for manager in self._managers:
            blocks = manager.req_to_blocks.get(request.request_id, [])
            if _is_live(manager):
                blocks = blocks[-1:]
            tables.append([NO_BLOCK if block.is_null else block.block_id for block in blocks])
        return tuple(tables)

    def settle(self, request: Request, num_tokens: int) -> None:
        """All blocks of a request of so many computed tokens have come: leave its tables as if it
        had been computed here, and what is full in the prefix cache."""
        request_id = request.request_id
        for manager in self._managers:
            blocks = manager.req_to_blocks[request_id]
            if _is_live(manager):
                state = blocks.pop()
                missing = _place_of_state(manager, num_tokens) - len(blocks)
                blocks.extend([manager.block_pool.null_block] * missing)
                blocks.append(state)
            elif self._kv_manager.kv_cache_config.needs_kv_cache_zeroing:
                # What is allocated by the step that needs it is zeroed by that step.
                num_blocks = -(-num_tokens // manager.block_size)
                manager.block_pool.free_blocks(reversed(blocks[num_blocks:]))
                del blocks[num_blocks:]
        # What has left a window while it was copied has no content here.
        self._kv_manager.remove_skipped_blocks(request_id, num_tokens)
        self._kv_manager.cache_blocks(request, num_tokens)


def _place_of_state(manager: Any, num_tokens: int) -> int:
    """Where a manager of states has the one after so many tokens."""
    return (num_tokens - 1) // int(manager.block_size)
