"""Options that cannot work are refused before a start; what has started ends with its server."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.server_process import server_environment
from tests.campaigns import THOROUGH
from tests.e2e.servers import CHECKOUT, ENGINE_FLAGS, OFFLINE, Server, llumsched

REFUSAL_TIMEOUT_S = 240
# What is refused, and words of the sentence that says so.
REFUSED = {
    "missing model": ["no model at /no/such/model"],
    "too little memory": ["500 instances", "GiB", "--instances"],
}
if THOROUGH:
    REFUSED |= {
        "port in use": ["Cannot listen", "--port"],
        "unknown policy": ["'freenes'", "'freeness'", "llumsched policies"],
    }


@dataclass(frozen=True, slots=True)
class Refusal:
    """How ``llumsched serve`` answers a command line that cannot be served."""

    status: int
    stdout: str
    stderr: str
    has_started_ray: bool

    @property
    def sentence(self) -> str:
        """All that it says itself."""
        (line,) = (li for li in self.stderr.splitlines() if li.startswith("llumsched serve: "))
        return line.removeprefix("llumsched serve: ")


@pytest.fixture(scope="module")
def refusals(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Refusal]:
    """All of them at once, as each takes seconds to import vLLM."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        commands = {
            "port in use": [model, f"--port={port}"],
            "missing model": ["/no/such/model", "--port=0"],
            "unknown policy": [model, "--policy=freenes", "--port=0"],
            "too little memory": [model, "--instances=500", "--port=0"],
        }
        commands = {name: arguments for name, arguments in commands.items() if name in REFUSED}
        started = {}
        for name, arguments in commands.items():
            folder = tmp_path_factory.mktemp("refused")
            started[name] = (
                folder,
                subprocess.Popen(
                    [sys.executable, "-m", "llumsched", "serve", *ENGINE_FLAGS, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=CHECKOUT,
                    # Ray makes a folder before anything else.
                    env=server_environment(**OFFLINE, RAY_TMPDIR=str(folder)),
                ),
            )
        refusals = {}
        for name, (folder, process) in started.items():
            try:
                stdout, stderr = process.communicate(timeout=REFUSAL_TIMEOUT_S)
            finally:
                process.kill()
            refusals[name] = Refusal(process.returncode, stdout, stderr, any(folder.iterdir()))
    return refusals


@pytest.mark.parametrize("name", REFUSED)
def test_one_sentence_before_anything_has_started(refusals: dict[str, Refusal], name: str) -> None:
    refusal = refusals[name]
    assert all(word in refusal.sentence for word in REFUSED[name]), refusal.sentence
    assert refusal.status != 0
    assert not refusal.has_started_ray
    assert "Traceback" not in refusal.stderr
    said = [li for li in refusal.stdout.splitlines() if li.startswith("(llumsched pid=")]
    assert said, "it says at once that it is there"
    assert "importing vLLM" in said[0]


@contextmanager
def booting(model: str, folder: Path) -> Iterator[Server]:
    server = llumsched(model, folder, "--instances=1", name="booting")
    try:
        yield server
    finally:
        server.end()


@pytest.mark.skipif(not THOROUGH, reason="the test below interrupts a boot")
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_ray_starts(model: str, tmp_path: Path, signal_number: signal.Signals) -> None:
    with booting(model, tmp_path) as server:
        server.await_process("raylet")
        ending = server.end(signal_number)
    assert not ending.killed
    assert ending.status != 0
    assert "serving" not in server.log()


def test_signals_while_instances_boot(model: str, tmp_path: Path) -> None:
    """An impatient user presses Ctrl-C again: that must not interrupt the ending."""
    with booting(model, tmp_path) as server:
        server.await_line("booting 1 instance ")
        ending = server.end(signal.SIGINT, times=3)
    assert not ending.killed
    assert ending.status == 130
    assert "serving" not in server.log()
