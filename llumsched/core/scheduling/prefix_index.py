"""Which instance holds which prefix block, fed by the engines' KV events.

A hash covers every block before it, so it names a whole prefix. It maps to a bit mask of holders;
masks of a single holder, nearly all of them, are shared objects, and with the per-instance sets a
million blocks cost less than 200 bytes each.

Invariants: the masks and the per-instance sets say the same; at most `max_blocks` distinct blocks
are kept, and what does not fit any more is not indexed (the start of a prompt is kept rather than
its end, so what is found is right, if short). An engine evicts a block only after the blocks that
follow it, so the holders of a prompt shrink along it: the depth of each is found by bisection, in a
handful of look-ups whatever the length. This module does not know what a match is worth.
"""

from collections.abc import Mapping

import numpy as np

from llumsched.core.snapshot import IntColumn, PrefixHolders

# Masks whose rows are kept: some megabytes at a thousand instances.
MAX_KEPT_MASKS = 2048


class PrefixIndex:
    """Bounded index of cached prefix blocks."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._holders: dict[int, int] = {}
        self._blocks: dict[str, set[int]] = {}
        self._bits: dict[str, int] = {}
        self._masks: dict[int, int] = {}
        self._free_slots: list[int] = []
        self._ids: tuple[str, ...] = ()
        self._slots_of_rows = np.empty(0, dtype=np.int64)
        self._rows_of_masks: dict[int, IntColumn] = {}
        self.num_dropped = 0
        """Blocks that were not indexed because the index was full."""

    def __len__(self) -> int:
        return len(self._holders)

    def add_instance(self, instance_id: str) -> None:
        """Prepare for the blocks of an instance."""
        slot = self._free_slots.pop() if self._free_slots else len(self._blocks)
        self._bits[instance_id] = 1 << slot
        self._blocks[instance_id] = set()
        self._ids = ()

    def remove_instance(self, instance_id: str) -> None:
        """Forget an instance and its blocks."""
        self.clear(instance_id)
        del self._blocks[instance_id]
        self._free_slots.append(self._bits.pop(instance_id).bit_length() - 1)
        self._ids = ()

    def store(self, instance_id: str, block_hashes: tuple[int, ...]) -> None:
        """An instance holds these blocks now; unknown instances are ignored."""
        bit = self._bits.get(instance_id)
        if bit is None:
            return
        holders, blocks = self._holders, self._blocks[instance_id]
        for block_hash in block_hashes:
            mask = holders.get(block_hash)
            if mask is None:
                if len(holders) >= self._max_blocks:
                    self.num_dropped += 1
                    continue
                holders[block_hash] = bit
                blocks.add(block_hash)
            elif not mask & bit:
                holders[block_hash] = self._shared(mask | bit)
                blocks.add(block_hash)

    def remove(self, instance_id: str, block_hashes: tuple[int, ...]) -> None:
        """An instance evicted these blocks."""
        bit = self._bits.get(instance_id)
        if bit is None:
            return
        blocks = self._blocks[instance_id]
        for block_hash in block_hashes:
            if block_hash in blocks:
                blocks.discard(block_hash)
                self._drop(block_hash, bit)

    def clear(self, instance_id: str) -> None:
        """An instance dropped its whole cache."""
        bit = self._bits.get(instance_id)
        if bit is None:
            return
        for block_hash in self._blocks[instance_id]:
            self._drop(block_hash, bit)
        self._blocks[instance_id] = set()

    def blocks_of(self, instance_id: str) -> frozenset[int]:
        """The blocks an instance is known to hold."""
        return frozenset(self._blocks.get(instance_id, ()))

    def state(self) -> dict[str, list[int]]:
        """State for a checkpoint: the blocks of each instance."""
        return {instance_id: list(blocks) for instance_id, blocks in self._blocks.items()}

    def restore(self, state: Mapping[str, list[int]]) -> None:
        """Go on from a checkpoint; the instances are there already."""
        for instance_id, blocks in state.items():
            self.store(instance_id, tuple(blocks))

    def match(
        self, prefix_hashes: tuple[int, ...], instance_ids: tuple[str, ...]
    ) -> list[PrefixHolders]:
        """Holders of a prompt's leading blocks with their numbers, longest first, each once.

        Rows are those of `instance_ids`.
        """
        if self._ids is not instance_ids:
            self._number_slots(instance_ids)
        get = self._holders.get
        depth = 0
        end = len(prefix_hashes)
        levels: list[tuple[int, int]] = []
        while depth < end:
            mask = get(prefix_hashes[depth], 0)
            if not mask:
                break
            # The last block that the same instances hold: they only become fewer further on.
            low, high = depth, end
            while high - low > 1:
                middle = (low + high) // 2
                if get(prefix_hashes[middle], 0) == mask:
                    low = middle
                else:
                    high = middle
            levels.append((high, mask))
            depth = high
        found = []
        further = 0
        for num_blocks, mask in reversed(levels):
            found.append(PrefixHolders(num_blocks, self._rows(mask & ~further)))
            further |= mask
        return found

    def _number_slots(self, instance_ids: tuple[str, ...]) -> None:
        self._ids = instance_ids
        slots = [self._bits[instance_id].bit_length() - 1 for instance_id in instance_ids]
        self._slots_of_rows = np.array(slots, dtype=np.int64)
        self._rows_of_masks.clear()

    def _rows(self, mask: int) -> IntColumn:
        """The rows of a mask; kept, since many prompts have the same holders."""
        rows = self._rows_of_masks.get(mask)
        if rows is None:
            num_slots = len(self._blocks) + len(self._free_slots)
            raw = np.frombuffer(mask.to_bytes(-(-num_slots // 8), "little"), dtype=np.uint8)
            bits = np.unpackbits(raw, bitorder="little")
            rows = np.flatnonzero(bits[self._slots_of_rows])
            rows.flags.writeable = False
            if len(self._rows_of_masks) >= MAX_KEPT_MASKS:
                self._rows_of_masks.clear()
            self._rows_of_masks[mask] = rows
        return rows

    def _shared(self, mask: int) -> int:
        """One object for equal masks, as long as there are not too many different ones."""
        if len(self._masks) > 65_536:
            self._masks.clear()
        return self._masks.setdefault(mask, mask)

    def _drop(self, block_hash: int, bit: int) -> None:
        mask = self._holders[block_hash] & ~bit
        if mask:
            self._holders[block_hash] = self._shared(mask)
        else:
            del self._holders[block_hash]
