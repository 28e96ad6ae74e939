"""Families of models, each as a tiny one: the kinds of layers of the real ones, few and narrow.

Of each family the groups of its KV cache are those of the real models, and its weights are random.
Windows and chunks are two blocks of the tests' engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

WINDOW = 64

# What continuous integration takes of them: each with another kind of cache, and of the kinds of
# request (`tests.migration.cases`) one of each sort.
CI_FAMILIES = ("gpt-oss",)
CI_ALONE = ("Granite 4", "Qwen3-Next")
CI_KINDS = (
    "greedy",
    "penalties, seed",
    "logprobs, seed",
    "regular expression",
    "three of one",
    "long prompt",
    "long answer",
)
# One sequence a request: three would be a batch.
ALONE_KINDS = tuple(name for name in CI_KINDS if name != "three of one")


@dataclass(frozen=True, slots=True)
class Family:
    """``config`` is what differs from ``COMMON``, ``flags`` are an engine's. ``kinds`` are those of
    requests where not all can be computed."""

    architecture: str
    config: Mapping[str, Any]
    flags: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()


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

# A request has blocks of each group, so there are more of them.
_MANY_GROUPS: Mapping[str, Any] = {"num_gpu_blocks_override": 257}
# Without prefix caching. Prompts of all kinds of requests fit into a step: of a seeded one that is
# computed in parts, vLLM 0.32 fails on a CPU (gpu_model_runner.py, line 3502).
_STATES: Mapping[str, Any] = {"enable_prefix_caching": False, "max_num_batched_tokens": 2048}

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
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
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
        _MANY_GROUPS,
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
        _MANY_GROUPS,
    ),
}

# Models of which an answer may depend on its batch, on a CPU: those with states, and with MLA. Of
# Mamba 2 with prefix caching, vLLM 0.32 keeps states within a prompt, and fails on a CPU, whose
# kernel returns none (mamba_mixer2.py, line 880): it is refused.
ALONE: dict[str, Family] = {
    # Mamba 2 beside attention.
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
        _STATES,
    ),
    # Gated delta nets beside attention. On a CPU they want bfloat16 (gdn_attention.py, line 158).
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
        {**_STATES, "dtype": "bfloat16"},
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
        _STATES,
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
        _STATES,
    ),
    # One vector a token instead of keys and values, and experts. Of vLLM's two backends of MLA on a
    # CPU, that with AMX wants bfloat16; the other has one size of vectors and blocks (cpu_mla.py).
    "DeepSeek-V3": Family(
        "DeepseekV3ForCausalLM",
        {
            "model_type": "deepseek_v3",
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "q_lora_rank": 64,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 64,
            "v_head_dim": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "topk_method": "noaux_tc",
        },
        {
            "attention_backend": "CPU_MLA",
            "num_gpu_blocks_override": 257,
            "max_num_batched_tokens": 2048,
        },
    ),
}

# The same with states cached for prefixes. A prompt is then computed in parts, so none has a seed.
for _name in ("Qwen3-Next", "LFM2"):
    _family = ALONE[_name]
    ALONE[f"{_name}, prefixes"] = replace(
        _family,
        flags={**_family.flags, "enable_prefix_caching": True},
        kinds=("greedy", "regular expression", "long prompt"),
    )
