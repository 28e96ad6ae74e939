"""Models for tests in which the content of answers does not matter: quick, and deterministic."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto import AutoConfig, AutoModelForCausalLM

from scripts.prepare_model import prepare_model
from tests.families import COMMON, Family

# Of SmolLM2's thirty; enough for tokens that depend on all that came before.
LAYERS = (0, 1, 2, 3, 26, 27, 28, 29)


def fewer_layers(folder: Path) -> str:
    """SmolLM2 with fewer layers, written to the folder: a step takes a third of the time."""
    whole = _without_weights(folder)
    kept = {}
    for name, tensor in load_file(whole / "model.safetensors").items():
        match = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if match is None:
            kept[name] = tensor
        elif int(match[1]) in LAYERS:
            kept[f"model.layers.{LAYERS.index(int(match[1]))}.{match[2]}"] = tensor
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    _change(folder, num_hidden_layers=len(LAYERS))
    return str(folder)


def random_weights(folder: Path) -> str:
    """A model whose step takes next to no time, with the tokens of SmolLM2, in the folder.

    Its heads can be shared out to two workers. The weights are large enough for its tokens to
    depend on what came before.
    """
    _without_weights(folder)
    _change(
        folder,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=False,
        initializer_range=0.08,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    return str(folder)


def of_family(family: Family, folder: Path) -> str:
    """A tiny model of a family with random weights, and SmolLM2's tokens, in the folder."""
    _without_weights(folder)
    config = AutoConfig.for_model(**(dict(COMMON) | dict(family.config)))
    config.architectures = [family.architecture]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    _change(folder, architectures=[family.architecture])
    return str(folder)


def _without_weights(folder: Path) -> Path:
    """Copy the files that a model has beside its weights; the folder they come from."""
    whole = Path(prepare_model())
    for path in whole.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            shutil.copy(path, folder)
    return whole


def _change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
