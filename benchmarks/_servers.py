"""Real servers for benchmarks: plain vLLM and llumsched, with the same flags, ended whole."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import psutil

from scripts.prepare_model import prepare_model
from scripts.server_process import ServerProcess, wait_until

CHECKOUT = Path(__file__).parents[1]
BOOT_TIMEOUT_S = 300.0

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


def processor_time_s(server: Server) -> float:
    """Processor time so far, in seconds, of a pool's processes that are ours: not of Ray's own."""
    total_s = 0.0
    launcher = psutil.Process(server.pid)
    for process in (launcher, *launcher.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            is_actor = process.name().startswith(("ray::SchedulerActor", "ray::Instance"))
            if is_actor or any("llumsched" in word for word in process.cmdline()[1:4]):
                times = process.cpu_times()
                total_s += times.user + times.system
    return total_s


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
    folder = Path(tempfile.mkdtemp(prefix="llumsched-benchmark-"))
    process = ServerProcess(folder / "server.log")
    print(f"booting {name} (log: {process.log_path})", file=sys.stderr, flush=True)
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    where = ["--host", "127.0.0.1", "--port", str(process.port)]
    process.start([*command, *where], cwd=CHECKOUT, **offline)
    try:
        _await_health(name, process)
        yield process.url, process.pid
    finally:
        process.end()
    shutil.rmtree(folder)


def _await_health(name: str, process: ServerProcess) -> None:
    def is_up() -> bool:
        if not process.is_running:
            raise RuntimeError(f"{name} ended with {process.status}; see {process.log_path}")
        with contextlib.suppress(OSError), urlopen(f"{process.url}/health", timeout=5):
            return True
        return False

    if not wait_until(is_up, BOOT_TIMEOUT_S):
        raise TimeoutError(f"{name} is not up in {BOOT_TIMEOUT_S:.0f} s; see {process.log_path}")
