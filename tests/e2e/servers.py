"""Servers under test: each a subprocess in a session of its own, from first line to last process.

Invariant: when ``end`` returns, no process of the session is left, and its answer says which had
to be killed. Nothing outside the session is ever signalled.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

CHECKOUT = Path(__file__).parents[2]

BOOT_TIMEOUT_S = 300.0
# From the signal to the end of its last process, on a machine that is busy with other things.
END_TIMEOUT_S = 30.0
KILL_TIMEOUT_S = 10.0
THAT_TIMEOUT_S = 30.0
POLL_INTERVAL_S = 0.1
# Of the server that has one.
API_KEY = "the-key"

# Servers that have not been ended, for whoever wants to show their logs.
RUNNING: list[Server] = []

# float32 keeps tokens equal whatever else is in the batch. Few blocks, so that an instance can be
# filled; short steps of prefill, so that a long prompt takes several.
ENGINE_FLAGS = (
    "--dtype=float32",
    "--enforce-eager",
    "--block-size=32",
    "--max-model-len=1024",
    "--num-gpu-blocks-override=65",
    "--kv-cache-memory-bytes=134217728",
    # Beside another request a long prompt is computed in chunks, which tests rely on; short ones
    # never are, since vLLM 0.32 on CPU dies of a seeded request whose prompt is (its generator has
    # no offset to reset).
    "--max-num-batched-tokens=1024",
    "--long-prefill-token-threshold=128",
    "--enable-auto-tool-choice",
    "--tool-call-parser=hermes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Its exit status, how long it took to end, and which processes had to be killed."""

    status: int | None
    took_s: float
    left: tuple[str, ...]


class Server:
    """A server of ``python -m MODULE`` with ``arguments``.

    Args:
        folder: takes the log.
        environment: set on top of this process's own.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.arguments = tuple(arguments)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / f"{name}.log"
        # Ray's sockets have long names: their folder must not. One of its own also keeps this
        # server from a cluster that someone has started on this machine.
        self._ray_folder = tempfile.mkdtemp(prefix="llumsched-")
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments, f"--port={self.port}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=CHECKOUT,
                env=server_environment(RAY_TMPDIR=self._ray_folder, **(environment or {})),
                # Not a session: while engines have all cores, Linux lets those of others wait.
                process_group=0,
            )
        RUNNING.append(self)
        self._booted_by_s = time.monotonic() + BOOT_TIMEOUT_S

    @property
    def pid(self) -> int:
        """Of the server's own process."""
        return self._process.pid

    def log(self, from_byte: int = 0) -> str:
        """What it has printed since the log was ``from_byte`` long."""
        with self.log_path.open("rb") as log:
            log.seek(from_byte)
            return log.read().decode(errors="replace")

    def await_health(self) -> None:
        """Wait until it serves."""
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5.0).status_code == 200:
                    return
            self._await_next("it serves")

    def await_line(self, part: str) -> None:
        """Wait until it has printed ``part``."""
        while part not in self.log():
            self._await_next(f"it says {part!r}")

    def await_process(self, name: str) -> None:
        """Wait until a process of this name is one of its own."""
        while name not in self.processes().values():
            self._await_next(f"{name} runs")

    def await_that(self, holds: Callable[[], bool], what: str) -> None:
        """Wait until ``holds()``; ``what`` it means is said if it does not come."""
        deadline_s = time.monotonic() + THAT_TIMEOUT_S
        while not holds():
            assert time.monotonic() < deadline_s, f"not in time: {what}\n{self._tail()}"
            time.sleep(POLL_INTERVAL_S)

    def _await_next(self, what: str) -> None:
        status = self._process.poll()
        assert status is None, f"{self.name} ended with {status} before {what}:\n{self._tail()}"
        assert time.monotonic() < self._booted_by_s, f"not in time: {what}\n{self._tail()}"
        time.sleep(POLL_INTERVAL_S)

    def _tail(self) -> str:
        return self.log()[-4000:]

    def processes(self) -> dict[int, str]:
        """Every process that it has started and that is alive now, itself too, with its name."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if (
                    process.environ().get("RAY_TMPDIR") == self._ray_folder
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found[process.pid] = process.name()
        return found

    def end(self, signal_number: signal.Signals = signal.SIGTERM, times: int = 1) -> Ending:
        """Tell the server, and it alone, to end; then kill what has not. Safe to call twice."""
        started_s = time.monotonic()
        for _ in range(times):
            if self._process.poll() is None:
                self._process.send_signal(signal_number)
            time.sleep(POLL_INTERVAL_S)
        left = self._await_gone(END_TIMEOUT_S)
        took_s = time.monotonic() - started_s
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        unkillable = self._await_gone(KILL_TIMEOUT_S)
        assert not unkillable, f"{self.name} could not be ended: {unkillable}"
        if self in RUNNING:
            RUNNING.remove(self)
        shutil.rmtree(self._ray_folder, ignore_errors=True)
        return Ending(status=self._process.poll(), took_s=took_s, left=tuple(sorted(left.values())))

    def _await_gone(self, timeout_s: float) -> dict[int, str]:
        deadline_s = time.monotonic() + timeout_s
        while self._process.poll() is None or self.processes():
            if time.monotonic() > deadline_s:
                return self.processes()
            time.sleep(POLL_INTERVAL_S)
        return {}


def llumsched(model: str, folder: Path, *flags: str, name: str = "llumsched", **env: str) -> Server:
    """``llumsched serve``, with the engine's flags of these tests."""
    return Server(name, ["llumsched", "serve", model, *ENGINE_FLAGS, *flags], folder, env)


def plain_vllm(model: str, folder: Path) -> Server:
    """``vllm serve`` as it is, with the same flags."""
    module = "vllm.entrypoints.launchers.api_server.entry"
    return Server("plain-vllm", [module, f"--model={model}", *ENGINE_FLAGS], folder)


def server_environment(**variables: str) -> dict[str, str]:
    """This process's environment, less what points to a running cluster, plus ``variables``."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
        **variables,
    }
    environment.pop("RAY_ADDRESS", None)
    return environment


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
