"""Two engines for all tests here, booted once; each test leaves them without a trace of itself."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto import AutoConfig, AutoModelForCausalLM

from scripts.prepare_model import prepare_model
from tests.migration.cases import CASES
from tests.migration.pool import Pool
from tests.migration.ways import answers_of

# The first request with logprobs would wait while a function of vLLM's is compiled.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


# Of SmolLM2's thirty; enough for tokens that depend on all that came before.
LAYERS = (0, 1, 2, 3, 26, 27, 28, 29)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2 with fewer layers: a step takes a third of the time."""
    whole, folder = Path(prepare_model()), tmp_path_factory.mktemp("model")
    for path in whole.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            shutil.copy(path, folder)
    kept = {}
    for name, tensor in load_file(whole / "model.safetensors").items():
        match = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if match is None:
            kept[name] = tensor
        elif int(match[1]) in LAYERS:
            kept[f"model.layers.{LAYERS.index(int(match[1]))}.{match[2]}"] = tensor
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((whole / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(LAYERS)}))
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of random weights whose step takes next to no time, with the tokens of SmolLM2.

    Its heads can be shared out to two workers. The weights are large enough for its tokens to
    depend on what came before.
    """
    whole, folder = Path(prepare_model()), tmp_path_factory.mktemp("tiny")
    for path in whole.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            shutil.copy(path, folder)
    config = json.loads((whole / "config.json").read_text()) | {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.08,
    }
    (folder / "config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def engines(model: str) -> Iterator[Pool]:
    with Pool(model, num_instances=3) as pool:
        yield pool


@pytest.fixture(scope="session")
def unmoved(engines: Pool) -> dict[str, Any]:
    """Every answer without a move, all asked at once of one instance."""
    return answers_of(engines, CASES)


@pytest.fixture
def pool(engines: Pool) -> Iterator[Pool]:
    """Three instances at rest, with nothing in their KV caches."""
    engines.recover()
    engines.forget_everything()
    yield engines
    engines.settle()
