"""Models for tests in which the content of answers does not matter: quick, and deterministic."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.idefics3 import Idefics3Config, Idefics3ForConditionalGeneration
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from scripts.prepare_model import prepare_model
from tests.families import COMMON, Family

# Of SmolLM2's thirty; enough for tokens that depend on all that came before.
LAYERS = (0, 1, 2, 3, 26, 27, 28, 29)
# Of a draft model's last layer, in standard deviations of its weights.
DRAFT_NOISE = 0.2
# Of images, in pixels.
IMAGE_SIZE, PATCH_SIZE, IMAGE_SCALE = 56, 14, 2
IMAGE_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


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


def drafting(target: str, folder: Path) -> str:
    """A draft model for a model of ``random_weights``: the same, with noise in its last layer, so
    that some guesses are right."""
    shutil.copytree(target, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    head = weights["lm_head.weight"]
    noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(1))
    weights["lm_head.weight"] = head + DRAFT_NOISE * head.std() * noise
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def eagle_head(target: str, folder: Path) -> str:
    """An EAGLE drafter for a model of ``random_weights``: its first layer, over its last hidden
    state."""
    weights = load_file(Path(target) / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    size = embedding.shape[1]
    kept = {
        name.removeprefix("model."): tensor
        for name, tensor in weights.items()
        if name.startswith("model.layers.0.") and "input_layernorm" not in name
    }
    kept["embed_tokens.weight"] = embedding
    kept["fc.weight"] = torch.cat([torch.zeros(size, size), torch.eye(size)], dim=1)
    shutil.copy(Path(target) / "config.json", folder)
    _change(folder, num_hidden_layers=1)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
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


def with_images(folder: Path) -> str:
    """A tiny Idefics 3, as SmolVLM is, with random weights and SmolLM2's tokens, in the folder."""
    tokenizer: Any = AutoTokenizer.from_pretrained(prepare_model())
    tokenizer.add_special_tokens({"additional_special_tokens": list(IMAGE_TOKENS)})
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    num_tokens = len(tokenizer)
    text = dict(COMMON) | {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "vocab_size": num_tokens + -num_tokens % 64,
    }
    config = Idefics3Config(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[0]),
        scale_factor=IMAGE_SCALE,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = Idefics3ForConditionalGeneration(config)
    model.save_pretrained(folder)
    edge = {"longest_edge": IMAGE_SIZE}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    side = IMAGE_SIZE // PATCH_SIZE // IMAGE_SCALE
    processor: Any = Idefics3Processor(images, tokenizer, image_seq_len=side**2)
    processor.save_pretrained(folder)
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
