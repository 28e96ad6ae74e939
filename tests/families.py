"""Families of models, each as a tiny one: the kinds of layers of the real ones, few and narrow.

Of each family the groups of its KV cache are those of the real models, and its weights are random.
Windows and chunks are two blocks of the tests' engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WINDOW = 64

# What continuous integration takes of them: each with another kind of cache, and of the kinds of
# request (`tests.migration.cases`) one of each sort.
CI_FAMILIES = ("gpt-oss",)
CI_KINDS = (
    "greedy",
    "penalties, seed",
    "logprobs, seed",
    "regular expression",
    "three of one",
    "long prompt",
    "long answer",
)


@dataclass(frozen=True, slots=True)
class Family:
    """``config`` is what differs from ``COMMON``, ``flags`` are an engine's."""

    architecture: str
    config: Mapping[str, Any]
    flags: Mapping[str, Any] = field(default_factory=dict)


COMMON: Mapping[str, Any] = {
    "vocab_size": 49152,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.08,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}

_MAMBA_2: Mapping[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 64,
}
_GDN: Mapping[str, Any] = {
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}

FAMILIES: dict[str, Family] = {
    # Attention sinks; every other layer has a window.
    "gpt-oss": Family(
        "GptOssForCausalLM",
        {
            "model_type": "gpt_oss",
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 64,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    # Two layers with a window to one without: three groups.
    "Gemma 3": Family(
        "Gemma3ForCausalLM",
        {
            "model_type": "gemma3_text",
            "num_hidden_layers": 6,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
        },
    ),
    # Attention within chunks, and layers without positions that see everything.
    "Llama 4": Family(
        "Llama4ForCausalLM",
        {
            "model_type": "llama4_text",
            "num_hidden_layers": 4,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 1, 1, 0],
            "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 256,
            "interleave_moe_layer_step": 2,
            "moe_layers": [1, 3],
        },
    ),
    # One vector a token instead of keys and values, and experts.
    "DeepSeek-V3": Family(
        "DeepseekV3ForCausalLM",
        {
            "model_type": "deepseek_v3",
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
    ),
}

# Refused so far. On a CPU, vLLM 0.32 runs none of them as these tests compare: gated delta nets
# want bfloat16 (ops/cpu/gdn_attention.py, line 158); short convolutions answered otherwise alone
# than in a batch, before any move; Mamba 2 is as its comment says.
STATEFUL: dict[str, Family] = {
    # Mamba 2 beside attention. Without prefix caching: with it, vLLM 0.32 keeps states from within
    # a prompt, and fails on a CPU, whose kernel returns none (mamba_mixer2.py, line 880).
    "Granite 4": Family(
        "GraniteMoeHybridForCausalLM",
        {
            "model_type": "granitemoehybrid",
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 256,
            "position_embedding_type": "nope",
            **_MAMBA_2,
        },
        {"enable_prefix_caching": False},
    ),
    # Gated delta nets beside attention.
    "Qwen3-Next": Family(
        "Qwen3NextForCausalLM",
        {
            "model_type": "qwen3_next",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            **_GDN,
        },
    ),
    # Short convolutions beside attention.
    "LFM2": Family(
        "Lfm2ForCausalLM",
        {
            "model_type": "lfm2",
            "num_hidden_layers": 4,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "conv_L_cache": 3,
            "block_ff_dim": 256,
            "conv_dim": 128,
            "block_dim": 128,
        },
    ),
    # States alone: nothing can be copied ahead.
    "Mamba 2": Family(
        "Mamba2ForCausalLM",
        {
            "model_type": "mamba2",
            "num_hidden_layers": 3,
            "num_heads": 8,
            "head_dim": 32,
            "state_size": 16,
            "n_groups": 1,
            "chunk_size": 64,
            "expand": 2,
            "conv_kernel": 4,
        },
    ),
}
