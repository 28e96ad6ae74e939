"""KV caches as vLLM itself allocates and views them, filled with random bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVQuantMode,
    MLAAttentionSpec,
    UniformTypeKVCacheSpecs,
    group_kernel_blocks,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from llumsched.engine.transfer.blocks import KVBlocks
from llumsched.engine.vllm.compat import first_of
from llumsched.engine.vllm.migration.kv import open_blocks

# 0.33 has it at the first place.
get_kv_cache_config_from_groups = first_of(
    ("vllm.v1.core.kv_cache_planning", "vllm.v1.core.kv_cache_utils"),
    "get_kv_cache_config_from_groups",
)

NUM_BLOCKS = 7
NUM_LAYERS = 3
BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of KV cache: the specs of its layers, and the block size of the kernels if smaller."""

    specs: tuple[KVCacheSpec, ...]
    kernel_block_size: int | None = None


def _attention(**changes: Any) -> FullAttentionSpec:
    given: dict[str, Any] = {"num_kv_heads": 4, "head_size": 8, "dtype": torch.bfloat16} | changes
    return FullAttentionSpec(block_size=BLOCK_SIZE, **given)


_MLA = MLAAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=24, dtype=torch.bfloat16)
_INLINE_SCALES = _attention(
    dtype=torch.uint8,
    kv_quant_mode=KVQuantMode.FP8_PER_TOKEN_HEAD,
    state_content_bytes=2 * (8 + 4),
)
_PAGE = _attention().page_size_bytes

KINDS = {
    "GQA": Kind(specs=(_attention(),) * NUM_LAYERS),
    "float32": Kind(specs=(_attention(dtype=torch.float32),) * NUM_LAYERS),
    "one KV head": Kind(specs=(_attention(num_kv_heads=1),) * NUM_LAYERS),
    "MLA": Kind(specs=(_MLA,) * NUM_LAYERS),
    "fp8": Kind(specs=(_attention(dtype=torch.float8_e4m3fn),) * NUM_LAYERS),
    "fp8, scales inline": Kind(specs=(_INLINE_SCALES,) * NUM_LAYERS),
    "padded": Kind(specs=(_attention(page_size_padded=_PAGE + 512),) * NUM_LAYERS),
    "split": Kind(specs=(_attention(),) * NUM_LAYERS, kernel_block_size=16),
    "MLA, split": Kind(specs=(_MLA,) * NUM_LAYERS, kernel_block_size=8),
    "mixed pages": Kind(specs=(_attention(), _attention(head_size=16), _attention())),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """``views`` are vLLM's, one ``[B, H, N, C]`` tensor a layer, all in ``buffer``."""

    config: KVCacheConfig
    views: list[torch.Tensor]
    buffer: torch.Tensor
    runner: Any
    blocks: KVBlocks

    def content(self, block_id: int) -> list[torch.Tensor]:
        """Content of a block in each layer."""
        return [
            group_kernel_blocks(view.view(torch.uint8), NUM_BLOCKS)[block_id].clone()
            for view in self.views
        ]

    def bytes_of(self, block_ids: Sequence[int]) -> torch.Tensor:
        """Which bytes of the buffer belong to these blocks, padding left out."""
        before, found = self.buffer.clone(), torch.zeros(len(self.buffer), dtype=torch.bool)
        for value in (0, 1):
            self.buffer.fill_(1 - value)
            for view in self.views:
                group_kernel_blocks(view.view(torch.uint8), NUM_BLOCKS)[list(block_ids)] = value
            found |= self.buffer == value
        self.buffer.copy_(before)
        return found


def make_cache(kind: Kind, layout: KVCacheLayout, seed: int, *, backend: str = "A") -> Cache:
    """Raises ``ValueError`` or ``AssertionError`` where vLLM has no such cache."""
    names = [f"layer.{index}" for index in range(len(kind.specs))]
    spec: KVCacheSpec = kind.specs[0]
    if len(set(kind.specs)) > 1:
        spec = UniformTypeKVCacheSpecs(
            block_size=BLOCK_SIZE, kv_cache_specs=dict(zip(names, kind.specs, strict=True))
        )
    cache_config = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: layout,
        prefix_cache_retention_interval=None,
        num_gpu_blocks_override=NUM_BLOCKS,
    )
    vllm_config: Any = SimpleNamespace(
        cache_config=cache_config, attention_config=SimpleNamespace(hisparse_config=None)
    )
    groups = [KVCacheGroupSpec(layer_names=names, kv_cache_spec=spec)]
    config = get_kv_cache_config_from_groups(vllm_config, groups, 1 << 30)
    size = kind.kernel_block_size
    by_name = allocate_kv_cache(
        config, torch.device("cpu"), layout, kernel_block_sizes=None if size is None else [size]
    )
    views = [by_name[name] for name in names]
    buffer = torch.empty(0, dtype=torch.uint8)
    buffer.set_(views[0].untyped_storage())
    generator = torch.Generator().manual_seed(seed)
    buffer.copy_(torch.randint(0, 256, buffer.shape, dtype=torch.uint8, generator=generator))
    attention = SimpleNamespace(backend=SimpleNamespace(get_name=lambda: backend))
    runner = SimpleNamespace(
        kv_cache_config=config,
        kv_caches=views,
        cache_config=cache_config,
        attn_groups=[[attention]],
    )
    return Cache(
        config=config, views=views, buffer=buffer, runner=runner, blocks=open_blocks(runner)[0]
    )
