"""Bytes of KV of one token, and parameters at work, from the shape of a model.

Pure functions of the numbers in a model's configuration. This module does not know any model by
name, nor how much memory an accelerator has.
"""

from __future__ import annotations


def attention_kv_bytes(
    *, num_layers: int, num_kv_heads: int, head_size: int, bytes_per_value: int = 2
) -> int:
    """KV bytes of one token, keys and values, for multi-head and grouped-query attention.

    With multi-head attention `num_kv_heads` is the number of attention heads; grouped-query and
    multi-query attention share a head among several.
    """
    return 2 * num_layers * num_kv_heads * head_size * bytes_per_value


def latent_kv_bytes(
    *, num_layers: int, latent_size: int, rope_size: int, bytes_per_value: int = 2
) -> int:
    """KV bytes of one token for multi-head latent attention (DeepSeek-V2, section 2.1).

    One compressed vector for keys and values (`kv_lora_rank`) and one key part with the position
    (`qk_rope_head_dim`) are kept a layer, whatever the number of heads.
    """
    return num_layers * (latent_size + rope_size) * bytes_per_value


def activated_parameters(
    *,
    num_shared_parameters: int,
    num_expert_layers: int,
    parameters_per_expert: int,
    experts_per_token: int,
) -> int:
    """Parameters that compute one token in a mixture of experts.

    Args:
        num_shared_parameters: everything outside the routed experts, shared experts included.
        experts_per_token: routed experts that a token is sent to in each layer that has them.
    """
    return num_shared_parameters + num_expert_layers * experts_per_token * parameters_per_expert


def tensor_parallel_kv_bytes(kv_bytes: int, num_kv_heads: int, tensor_parallel: int) -> int:
    """KV bytes of one token on one of `tensor_parallel` ranks.

    Heads are split while there are any to split and kept whole on every rank beyond that; latent
    attention has one head (`num_kv_heads=1`), so every rank holds all of it.
    """
    return kv_bytes // min(tensor_parallel, num_kv_heads)
