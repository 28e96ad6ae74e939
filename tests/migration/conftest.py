"""Two engines for all tests here, booted once; each test leaves them without a trace of itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm.distributed import parallel_state
from vllm.lora.request import LoRARequest

from tests import runner_v2
from tests.campaigns import THOROUGH
from tests.families import (
    ALONE,
    ALONE_KINDS,
    CI_ALONE,
    CI_FAMILIES,
    CI_KINDS,
    FAMILIES,
    Family,
)
from tests.migration.adapters import make_adapter
from tests.migration.cases import CASES
from tests.migration.pool import Pool
from tests.migration.ways import answers_of
from tests.models import fewer_layers, of_family, random_weights


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
def unmoved(engines: Pool, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Every answer without a move, all asked at once of one instance."""
    cases = CASES
    if runner_v2.IS_ON:
        # A step takes long there.
        asked = _asked_for(request.session)
        cases = {name: case for name, case in CASES.items() if name in asked}
    return answers_of(engines, cases)


def _asked_for(session: pytest.Session) -> set[str]:
    """The cases that the tests of this run look up: one by their parameter, or any."""
    asked: set[str] = set()
    for item in session.items:
        if "unmoved" not in getattr(item, "fixturenames", ()):
            continue
        call = getattr(item, "callspec", None)
        name = call.params.get("name") if call is not None else None
        if name is None:
            return set(CASES)
        asked.add(name)
    return asked


@pytest.fixture
def pool(engines: Pool) -> Iterator[Pool]:
    """Three instances at rest, with nothing in their KV caches."""
    engines.recover()
    engines.forget_everything()
    yield engines
    engines.settle()


@pytest.fixture(scope="session", params=FAMILIES if THOROUGH else CI_FAMILIES)
def family_pool(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pool]:
    """Two engines of a tiny model of one family."""
    with _pool_of(FAMILIES[request.param], tmp_path_factory) as pool:
        yield pool


@pytest.fixture(scope="session", params=ALONE if THOROUGH else CI_ALONE)
def alone_family(request: pytest.FixtureRequest) -> Family:
    return ALONE[request.param]


@pytest.fixture(scope="session")
def alone_pool(alone_family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Two engines of a tiny model, for requests that are alone in their engine."""
    with _pool_of(alone_family, tmp_path_factory) as pool:
        yield pool


def _pool_of(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    model = of_family(family, tmp_path_factory.mktemp("family"))
    # Engines of a process share vLLM's groups; those of a model without experts have none for them.
    parallel_state.destroy_model_parallel()
    pool = Pool(model, **family.flags)
    assert pool.instances[0].port.refusal is None
    return pool


@pytest.fixture(scope="session")
def family_unmoved(family_pool: Pool) -> dict[str, Any]:
    """Answers of that model without a move."""
    names = CASES if THOROUGH else CI_KINDS
    return answers_of(family_pool, {name: CASES[name] for name in names})


@pytest.fixture(scope="session")
def alone_unmoved(alone_pool: Pool, alone_family: Family) -> dict[str, Any]:
    """Answers of that model without a move, each computed alone."""
    answers: dict[str, Any] = {}
    for name in alone_family.kinds or ALONE_KINDS:
        answers |= answers_of(alone_pool, {name: CASES[name]})
    return answers
