"""vLLM's KV cache, described in bytes for ``engine.transfer``.

vLLM keeps the KV cache of a worker in one allocation and says of each set of equal layers where a
layer's page of a block begins (``KVCacheTensor``). Inside a page, the axes heads, tokens and
content are ordered by the layout that the attention backends agreed on. All six layouts of vLLM
0.31 to 0.33 are understood: heads before or after tokens, layers or blocks outermost, pages padded
or of several sizes, blocks split into smaller ones for the kernels, scales kept beside quantised
values. Padding does not move.

The groups of a cache lie over one another: a block belongs to one group at a time, and each group
has a layout of its own. A state (of Mamba, say) is a page like others, of one token.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    UniformTypeKVCacheSpecs,
    compute_layer_kv_cache_shape_bytes,
    compute_layout_strides,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from llumsched.engine.transfer.blocks import BlockLayout, KVBlocks, Runs, joined, runs_of
from llumsched.engine.transfer.shards import ShardOpened, serve_shard


def block_layouts(
    config: KVCacheConfig, layout: KVCacheLayout, backends: tuple[str, ...] = ()
) -> tuple[BlockLayout, ...]:
    """Where the blocks of each KV cache group lie in the worker's allocation.

    Args:
        backends: names of the attention backends, one entry a group.

    Raises:
        ValueError: if a group's blocks are not all in that allocation.
    """
    return tuple(
        BlockLayout(
            name=layout.name,
            num_blocks=config.num_blocks,
            runs=_runs_of_group(config, group_id, layout),
            backend=backends[group_id] if backends else "",
        )
        for group_id in range(len(config.kv_cache_groups))
    )


def _runs_of_group(config: KVCacheConfig, group_id: int, layout: KVCacheLayout) -> tuple[Runs, ...]:
    group = config.kv_cache_groups[group_id]
    if group.host_resident:
        raise ValueError("a part of the KV cache is in host memory")
    found: list[Runs] = []
    for tensor in config.kv_cache_tensors:
        if tensor.layers[0] not in group.layer_names:
            continue
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            spec = spec.kv_cache_specs[tensor.layers[0]]
        if tensor.host_resident or not spec.has_layer_views:
            raise ValueError(f"{type(spec).__name__} keeps its blocks in a way of its own")
        # As ``create_kv_cache_views`` makes them. Kernels that split a block see other heads and
        # tokens, but the same bytes.
        sizes = (len(tensor.layers), *compute_layer_kv_cache_shape_bytes(spec, config.num_blocks))
        strides = compute_layout_strides(
            spec,
            config.num_blocks,
            len(tensor.layers),
            layout,
            fixed_strides=(tensor.layer_stride, tensor.block_stride, None, None, None),
        )
        found += runs_of(
            offset=tensor.offset,
            sizes=(sizes[0], *sizes[2:]),
            strides=(strides[0], *strides[2:]),
            block_stride=strides[1],
        )
    return joined(found)


def open_blocks(model_runner: Any) -> tuple[KVBlocks, ...]:
    """The blocks of a worker, of each KV cache group, by its model runner (V1 or V2).

    Raises:
        ValueError: if they cannot be copied; the message is the reason.
    """
    config: KVCacheConfig = model_runner.kv_cache_config
    if not model_runner.kv_caches:
        raise ValueError("the model has no KV cache")
    layouts = block_layouts(
        config,
        model_runner.cache_config.get_resolved_kv_cache_layout(),
        tuple(
            ", ".join(sorted({attention.backend.get_name() for attention in attentions}))
            for attentions in model_runner.attn_groups
        ),
    )
    return tuple(KVBlocks(model_runner.kv_caches[0], layout) for layout in layouts)


def open_shard(worker: Any, engine_pid: int, pipes: list[tuple[int, int]]) -> ShardOpened:
    """Begin to copy for the engine; run inside a worker, by the executor's ``collective_rpc``.

    Args:
        pipes: the engine's descriptors, a pair for each rank.
    """
    try:
        groups = open_blocks(worker.model_runner)
    except ValueError as error:
        return ShardOpened(refused=str(error))
    return serve_shard(groups, engine_pid, pipes[worker.rank])
