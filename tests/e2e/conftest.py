"""The servers of the end-to-end tests, each booted once, and what plain vLLM answers.

They end with this package, and do not take their share of the processor while others are tested.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from scripts.server_process import free_port
from tests.e2e.client import Admin, Client
from tests.e2e.collector import Collector
from tests.e2e.plain import PlainAnswers
from tests.e2e.servers import (
    ADAPTER,
    API_KEY,
    MAX_NUM_SEQS,
    RUNNING,
    Server,
    llumsched,
    plain_vllm,
)
from tests.migration.adapters import RANK, make_adapter
from tests.models import fewer_layers

LOG_TAIL_NUM_CHARACTERS = 6000

APART = """
policy: prefix_aware
parts:
  predictor:
    name: moving_quantile
    min_samples: 1
  # Nothing moves by itself.
  migration: none
transfer: {transport: tcp, checksum: true}
"""

_log_sizes = pytest.StashKey[dict[str, int]]()


@pytest.fixture(scope="session", autouse=True)
def servers_end_with_the_tests() -> Iterator[None]:
    """When a time limit's SIGTERM ends these tests as well, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Steps that are quick beside what else these tests wait for."""
    return fewer_layers(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="package")
def llumsched_server(model: str, log_folder: Path) -> Iterator[Server]:
    """Two instances that move requests only when told; it may still be booting."""
    server = llumsched(model, log_folder, "--instances=2", "--policy=round_robin")
    try:
        yield server
    finally:
        ending = server.end()
    assert not ending.killed, f"left after SIGTERM: {ending.killed}\n{server.log()[-4000:]}"


@pytest.fixture(scope="package")
def plain_server(llumsched_server: Server, model: str, log_folder: Path) -> Iterator[Server]:
    """``vllm serve`` as it is. It boots beside llumsched's, and stays for the proxy."""
    server = plain_vllm(model, log_folder)
    try:
        server.await_health()
        yield server
    finally:
        server.end()


@pytest.fixture(scope="package")
def plain(plain_server: Server, model: str) -> PlainAnswers:
    """Answers of plain vLLM to every case."""
    return PlainAnswers(Client(plain_server.url, model))


@pytest.fixture(scope="package")
def booted(llumsched_server: Server, model: str) -> Iterator[Admin]:
    llumsched_server.await_health()
    client = Admin(llumsched_server.url, model)
    yield client
    client.close()


@pytest.fixture(scope="package")
def server_apart(model: str, log_folder: Path) -> Iterator[Server]:
    """Two instances that share no memory, under policies that look at prefixes and lengths, behind
    an API key. The last of its tests ends it by Ctrl-C."""
    config = log_folder / "apart.yaml"
    config.write_text(APART)
    flags = ("--instances=2", f"--config={config}", f"--decision-log={log_folder / 'decisions'}")
    server = llumsched(model, log_folder, *flags, name="llumsched-apart", VLLM_API_KEY=API_KEY)
    try:
        server.await_health()
        yield server
    finally:
        server.end()


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """Spans of the pool of two frontends."""
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="package")
def events_port() -> int:
    """The first of two ports of loopback that nothing listens on."""
    return free_port()


@pytest.fixture(scope="package")
def unusual_server(
    model: str, log_folder: Path, collector: Collector, events_port: int
) -> Iterator[Server]:
    """Two instances behind two frontends, with what few pools have: tracing, KV events, adapters,
    priorities in the engines' queues."""
    adapter = log_folder / "adapter"
    adapter.mkdir()
    make_adapter(model, adapter)
    events = {"enable_kv_cache_events": True, "endpoint": f"tcp://*:{events_port}"}
    server = llumsched(
        model,
        log_folder,
        *("--instances=2", "--frontends=2", "--policy=round_robin"),
        *("--scheduling-policy=priority", f"--max-num-seqs={MAX_NUM_SEQS}"),
        *("--enable-lora", f"--max-lora-rank={RANK}", f"--lora-modules={ADAPTER}={adapter}"),
        f"--kv-events-config={json.dumps(events)}",
        f"--otlp-traces-endpoint={collector.endpoint}",
        "--shutdown-timeout=25",
        name="llumsched-unusual",
        VLLM_SERVER_DEV_MODE="1",
        OTEL_BSP_SCHEDULE_DELAY="200",
    )
    try:
        server.await_health()
        yield server
    finally:
        ending = server.end()
    assert not ending.left


@pytest.fixture
def pool_apart(server_apart: Server, model: str) -> Iterator[Admin]:
    """The server's instances at rest; the test must leave them at rest as well."""
    with Admin.at_rest(server_apart.url, model, API_KEY) as pool:
        yield pool


@pytest.fixture
def pool(booted: Admin) -> Iterator[Admin]:
    """Two instances at rest; the test must leave them at rest as well."""
    # The test before has waited for more.
    booted.await_idle(num_reports=0)
    yield booted
    booted.await_idle()


# ---- the logs of the servers, shown with a test that failed --------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    item.stash[_log_sizes] = {s.name: s.log_path.stat().st_size for s in RUNNING}
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for server in RUNNING:
            since = item.stash[_log_sizes].get(server.name, 0)
            said = server.log(since)[-LOG_TAIL_NUM_CHARACTERS:]
            report.sections.append((f"log of {server.name} since the test began", said))
    return report
