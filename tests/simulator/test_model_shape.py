"""Shapes of published models: their parameters are those that their authors state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llumsched.simulator.hardware.model_shape import ShapeError, read_shape, shape_of

LLAMA_3_1_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}
MIXTRAL_8X7B = LLAMA_3_1_8B | {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32_000,
}
QWEN3_30B_A3B: dict[str, Any] = {
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "vocab_size": 151_936,
}
DEEPSEEK_V3: dict[str, Any] = {
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129_280,
}


# Of those who published them; an embedding that is only looked up computes nothing.
@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (LLAMA_3_1_8B, 8.03 - 0.53),
        (MIXTRAL_8X7B, 12.9),
        (QWEN3_30B_A3B, 3.3 - 0.31),
        (DEEPSEEK_V3, 37.0),
    ],
)
def test_parameters_that_compute_a_token_are_those_published(
    config: dict[str, Any], billions: float
) -> None:
    shape = shape_of(config, source="config.json")
    assert shape.compute.activated_parameters / 1e9 == pytest.approx(billions, rel=0.03)


def test_kv_is_kept_by_group_or_as_a_latent() -> None:
    assert shape_of(LLAMA_3_1_8B, source="").kv_bytes_per_token == 131_072
    assert shape_of(DEEPSEEK_V3, source="").kv_bytes_per_token == 70_272
    eight_bits = shape_of(LLAMA_3_1_8B, source="", kv_bytes_per_value=1)
    assert eight_bits.kv_bytes_per_token == 65_536


def test_tensor_parallelism_splits_everything_but_a_latent() -> None:
    whole, quarter = (shape_of(LLAMA_3_1_8B, source="", tensor_parallel=t) for t in (1, 4))
    assert quarter.kv_bytes_per_token * 4 == whole.kv_bytes_per_token
    assert quarter.compute.activated_parameters * 4 == whole.compute.activated_parameters
    assert quarter.compute.attention_width * 4 == whole.compute.attention_width
    assert shape_of(DEEPSEEK_V3, source="", tensor_parallel=8).kv_bytes_per_token == 70_272


def test_the_text_part_of_a_model_of_several_parts_counts(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"vision_config": {}, "text_config": LLAMA_3_1_8B}))
    assert read_shape(path) == shape_of(LLAMA_3_1_8B, source="")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must be an object"),
        ("{}", "'num_attention_heads' is missing"),
        ('{"num_attention_heads": "32"}', "must be a whole number, not '32'"),
        ('{"num_attention_heads": 30}', "30 attention heads cannot be split over 4"),
    ],
)
def test_what_is_missing_or_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ShapeError, match=message):
        read_shape(path, tensor_parallel=4)
    with pytest.raises(ShapeError, match="cannot be read"):
        read_shape(tmp_path / "none.json")
