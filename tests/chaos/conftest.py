"""A pool that things happen to. Fixtures and logs are those of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import saboteur
from tests.chaos.faults import FaultyPool
from tests.chaos.load import References
from tests.e2e.conftest import (  # noqa: F401
    log_folder,
    model,
    pytest_runtest_makereport,
    pytest_runtest_setup,
    servers_end_with_the_tests,
)
from tests.e2e.servers import llumsched


@pytest.fixture(scope="package")
def faulty_pool(model: str, log_folder: Path) -> Iterator[FaultyPool]:  # noqa: F811
    """Two instances, ended by the tests only; not kept for what other folders test."""
    config = log_folder / "chaos.yaml"
    config.write_text(saboteur.CONFIG)
    flags = ("--instances=2", f"--config={config}", "--max-num-seqs=16", "--step-timeout=20")
    env = {saboteur.FOLDER: str(log_folder)}
    server = llumsched(model, log_folder, *flags, name="chaos", **env)
    with FaultyPool.until_its_end(server, model, log_folder, server.await_health) as pool:
        yield pool


@pytest.fixture
def pool(faulty_pool: FaultyPool) -> Iterator[FaultyPool]:
    """Two instances at rest; the test must leave the pool so that it comes to rest."""
    faulty_pool.await_serving(2)
    faulty_pool.await_idle()
    yield faulty_pool
    faulty_pool.await_serving(2)
    faulty_pool.await_idle()


@pytest.fixture(scope="package")
def references(faulty_pool: FaultyPool) -> References:
    """Answers of the pool while nothing happens to it."""
    return References.of(faulty_pool)
