"""Real servers for benchmarks: plain vLLM and llumsched, with the same flags, ended by pid."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from scripts.prepare_model import prepare_model

BOOT_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0

# float32 keeps token equality inside a batch; eager skips minutes of compiling a tiny model.
ENGINE_FLAGS = (
    "--dtype",
    "float32",
    "--enforce-eager",
    "--block-size",
    "32",
    "--max-model-len",
    "4096",
    "--kv-cache-memory-bytes",
    str(1 << 30),
)
FRONTEND_FLAGS = ("--disable-uvicorn-access-log",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that answers. ``model`` is the name requests must give."""

    url: str
    model: str
    pid: int


def scheduler_of(server: Server) -> psutil.Process:
    """The process of a pool's global scheduler; there is one, unless it is being started."""
    processes = psutil.Process(server.pid).children(recursive=True)
    (found,) = (p for p in processes if p.name().startswith("ray::SchedulerActor"))
    return found


def frontend_of(server: Server) -> psutil.Process:
    """The process of a server's only frontend."""
    processes = psutil.Process(server.pid).children()
    (found,) = (p for p in processes if "llumsched.frontend.workers" in p.cmdline())
    return found


@contextmanager
def plain_vllm(flags: Sequence[str] = ENGINE_FLAGS) -> Iterator[Server]:
    """``vllm serve`` as it is, with its defaults but for ``flags``."""
    command = ["-m", "vllm.entrypoints.launchers.api_server.entry", "--model"]
    with _server("plain vLLM", command, flags) as server:
        yield server


@contextmanager
def llumsched(instances: int, flags: Sequence[str] = ENGINE_FLAGS) -> Iterator[Server]:
    """``llumsched serve`` with this many instances on a local Ray."""
    command = ["-m", "llumsched", "serve", "--instances", str(instances), "--model"]
    with _server(f"llumsched, {instances} instances", command, flags) as server:
        yield server


@contextmanager
def _server(name: str, command: list[str], flags: Sequence[str]) -> Iterator[Server]:
    model = prepare_model()
    arguments = [sys.executable, *command, model, *flags, *FRONTEND_FLAGS]
    with launched(name, arguments) as (url, pid):
        yield Server(url=url, model=model, pid=pid)


@contextmanager
def launched(name: str, command: Sequence[str]) -> Iterator[tuple[str, int]]:
    """A program that takes ``--host`` and ``--port``, from when it is healthy on: URL and pid.

    Raises:
        RuntimeError: it ended before that; the message names its log.
        TimeoutError: it was not healthy in time.
    """
    port = _free_port()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.pop("RAY_ADDRESS", None)
    with tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False) as log:
        print(f"booting {name} (log: {log.name})", file=sys.stderr, flush=True)
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            cwd=Path(__file__).parents[1],
            # Not a session: while engines have all cores, Linux lets those of others wait.
            process_group=0,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await_health(name, url, process, log.name)
        yield url, process.pid
    finally:
        _end(process)
    Path(log.name).unlink()


def _await_health(name: str, url: str, process: subprocess.Popen[bytes], log: str) -> None:
    deadline_s = time.monotonic() + BOOT_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with status {process.returncode}; see {log}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise TimeoutError(f"{name} did not answer within {BOOT_TIMEOUT_S:.0f} s; see {log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
