"""Two engines for all tests here, booted once; each test leaves them without a trace of itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from tests import runner_v2
from tests.migration.adapters import make_adapter
from tests.migration.cases import CASES
from tests.migration.pool import Pool
from tests.migration.ways import answers_of
from tests.models import fewer_layers, random_weights


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    # Each step of runner V2 takes as long as some of V1.
    return random_weights(folder) if runner_v2.IS_ON else fewer_layers(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_weights(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def adapter(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> LoRARequest:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapter"))


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
