"""Costs of a model by its shape, read from the `config.json` that comes with it.

Understood are decoders with multi-head, grouped-query or latent attention and gated MLPs, dense or
with routed experts, under the keys that Hugging Face's configurations have for them. Numbers are
those of one accelerator where the model is split over several by tensor parallelism.

This module does not know what anything costs (`hardware`), nor how much memory there is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llumsched.simulator.hardware.kv_shape import (
    activated_parameters,
    attention_kv_bytes,
    latent_kv_bytes,
    tensor_parallel_kv_bytes,
)
from llumsched.simulator.hardware.spec import ComputeShape

_MOST = 10**9
_NUM_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


class ShapeError(ValueError):
    """The configuration of a model lacks what is needed; the message names file and key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Computation and reads of a step, on one accelerator."""

    compute: ComputeShape
    kv_bytes_per_token: int
    num_experts: int = 0
    """Routed experts of a layer; 0 for a dense model."""


def read_shape(path: Path, *, tensor_parallel: int = 1, kv_bytes_per_value: int = 2) -> ModelShape:
    """The shape of the model in this `config.json`.

    Raises:
        ShapeError: it cannot be read, lacks a key, or does not divide by `tensor_parallel`.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ShapeError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ShapeError(f"{path}: not JSON: {error}") from error
    # Models of several parts have one configuration for each.
    if isinstance(config, dict):
        config = config.get("text_config", config)
    if not isinstance(config, dict):
        raise ShapeError(f"{path}: must be an object")
    return shape_of(
        config,
        source=str(path),
        tensor_parallel=tensor_parallel,
        kv_bytes_per_value=kv_bytes_per_value,
    )


def shape_of(
    config: Mapping[str, Any],
    *,
    source: str,
    tensor_parallel: int = 1,
    kv_bytes_per_value: int = 2,
) -> ModelShape:
    """`read_shape`, for a configuration that was read already; `source` names it in errors.

    Raises:
        ShapeError: see there.
    """
    keys = _Keys(config, source)
    num_heads = keys.number("num_attention_heads")
    if num_heads % tensor_parallel:
        raise ShapeError(
            f"{source}: {num_heads} attention heads cannot be split over {tensor_parallel}"
        )
    if keys.optional("kv_lora_rank"):
        attention, kv_bytes, num_kv_heads, width = _latent(keys, kv_bytes_per_value)
    else:
        attention, kv_bytes, num_kv_heads, width = _grouped(keys, kv_bytes_per_value)
    head = keys.number("hidden_size") * keys.number("vocab_size")
    num_parameters = _mlps(keys, num_shared=attention + head)
    return ModelShape(
        compute=ComputeShape(
            activated_parameters=num_parameters // tensor_parallel,
            attention_width=width // tensor_parallel,
        ),
        kv_bytes_per_token=tensor_parallel_kv_bytes(kv_bytes, num_kv_heads, tensor_parallel),
        num_experts=keys.optional(*_NUM_EXPERTS) or 0,
    )


class _Keys:
    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self._config = config
        self._source = source

    def number(self, *names: str) -> int:
        """The first of these keys that is there."""
        value = self.optional(*names)
        if value is None:
            raise ShapeError(f"{self._source}: {' or '.join(map(repr, names))} is missing")
        if value < 1:
            raise ShapeError(f"{self._source}: {' or '.join(map(repr, names))} must be at least 1")
        return value

    def optional(self, *names: str) -> int | None:
        for name in names:
            value = self._config.get(name)
            if value is None:
                continue
            if type(value) is not int or not 0 <= value <= _MOST:
                raise ShapeError(
                    f"{self._source}: {name!r} must be a whole number, not {value!r:.60}"
                )
            return value
        return None


def _grouped(keys: _Keys, bytes_per_value: int) -> tuple[int, int, int, int]:
    """Parameters, KV bytes, KV heads and width of multi-head or grouped-query attention."""
    num_layers, hidden = keys.number("num_hidden_layers"), keys.number("hidden_size")
    num_heads = keys.number("num_attention_heads")
    num_kv_heads = keys.optional("num_key_value_heads") or num_heads
    head_size = keys.optional("head_dim") or hidden // num_heads
    num_parameters = num_layers * 2 * hidden * head_size * (num_heads + num_kv_heads)
    kv_bytes = attention_kv_bytes(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        bytes_per_value=bytes_per_value,
    )
    return num_parameters, kv_bytes, num_kv_heads, num_layers * num_heads * head_size


def _latent(keys: _Keys, bytes_per_value: int) -> tuple[int, int, int, int]:
    """The same of multi-head latent attention (DeepSeek-V2, section 2.1)."""
    num_layers, hidden = keys.number("num_hidden_layers"), keys.number("hidden_size")
    num_heads = keys.number("num_attention_heads")
    latent, rope = keys.number("kv_lora_rank"), keys.number("qk_rope_head_dim")
    key_size, value_size = keys.number("qk_nope_head_dim"), keys.number("v_head_dim")
    query_size = num_heads * (key_size + rope)
    query_latent = keys.optional("q_lora_rank")
    queries = query_latent * (hidden + query_size) if query_latent else hidden * query_size
    keys_and_values = hidden * (latent + rope) + latent * num_heads * (key_size + value_size)
    output = num_heads * value_size * hidden
    kv_bytes = latent_kv_bytes(
        num_layers=num_layers,
        latent_size=latent,
        rope_size=rope,
        bytes_per_value=bytes_per_value,
    )
    width = num_layers * num_heads * (key_size + rope + value_size) // 2
    return num_layers * (queries + keys_and_values + output), kv_bytes, 1, width


def _mlps(keys: _Keys, *, num_shared: int) -> int:
    """Parameters that compute a token, with those that are not of an MLP given."""
    num_layers, hidden = keys.number("num_hidden_layers"), keys.number("hidden_size")
    dense = 3 * hidden * keys.number("intermediate_size", "moe_intermediate_size")
    num_experts = keys.optional(*_NUM_EXPERTS)
    if not num_experts:
        return num_shared + num_layers * dense
    expert = 3 * hidden * keys.number("moe_intermediate_size", "intermediate_size")
    shared = (keys.optional("n_shared_experts") or 0) * expert
    shared += 3 * hidden * (keys.optional("shared_expert_intermediate_size") or 0)
    num_dense_layers = min(keys.optional("first_k_dense_replace") or 0, num_layers)
    num_expert_layers = num_layers - num_dense_layers
    router = hidden * num_experts
    return activated_parameters(
        num_shared_parameters=num_shared
        + num_dense_layers * dense
        + num_expert_layers * (shared + router),
        num_expert_layers=num_expert_layers,
        parameters_per_expert=expert,
        experts_per_token=keys.number("num_experts_per_tok"),
    )
