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
from safetensors.torch import load_file, save_file

from scripts.prepare_model import prepare_model
from tests.migration.answers import seen_by_client
from tests.migration.cases import CASES
from tests.migration.pool import Pool

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
def engines(model: str) -> Iterator[Pool]:
    with Pool(model, num_instances=3) as pool:
        yield pool


@pytest.fixture(scope="session")
def unmoved(engines: Pool) -> dict[str, Any]:
    """Every answer without a move, all asked at once of one instance."""
    for name, case in CASES.items():
        engines.submit(name, case.prompt(engines.tokenizer), case.params, **case.fields)
    answers = dict(zip(CASES, engines.finish(*CASES), strict=True))
    engines.settle()
    return {name: seen_by_client(answer) for name, answer in answers.items()}


@pytest.fixture
def pool(engines: Pool) -> Iterator[Pool]:
    """Three instances at rest, with nothing in their KV caches."""
    engines.recover()
    engines.forget_everything()
    yield engines
    engines.settle()
