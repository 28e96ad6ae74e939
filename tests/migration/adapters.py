"""A LoRA adapter for the tiny model, and requests that name it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

from tests.migration.cases import Case, params

RANK = 8
# Of engines that take adapters.
FLAGS = {"enable_lora": True, "max_lora_rank": RANK}
LORA: dict[str, Case] = {
    "LoRA": Case(params()),
    "LoRA, seed": Case(params(temperature=0.8, seed=6)),
    "LoRA, long prompt": Case(params(), is_long=True),
}


def make_adapter(model: str, folder: Path) -> LoRARequest:
    """An adapter of random weights, large enough to change what the model says."""
    config = json.loads((Path(model) / "config.json").read_text())
    num_in, head_size = config["hidden_size"], config["head_dim"]
    num_out = {
        "q_proj": config["num_attention_heads"] * head_size,
        "v_proj": config["num_key_value_heads"] * head_size,
    }
    random = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in num_out.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (RANK, num_in)), ("lora_B", (size, RANK))):
                weights[f"{prefix}.{part}.weight"] = torch.randn(shape, generator=random) * 0.2
    save_file(weights, folder / "adapter_model.safetensors")
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(num_out),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config))
    return LoRARequest("of the tests", 1, str(folder))


def with_adapter(cases: Mapping[str, Case], adapter: LoRARequest) -> dict[str, Case]:
    """The same requests, all of which name the adapter."""
    return {name: replace(case, fields={"lora_request": adapter}) for name, case in cases.items()}
