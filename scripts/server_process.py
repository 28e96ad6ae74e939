"""A server as a subprocess, from its first line to its last process: of demos, benchmarks, tests.

Invariant: when ``end`` returns, no process that the server started is left, whatever happened to
the server, and the answer says which had to be killed. They are found by the folder of Ray's in
their environment, which children inherit, so that even one whose parent is gone is found. A process
that names itself may overwrite its environment, as vLLM's own do: such are found as children of
those, and remembered. Nothing else on the machine is ever signalled.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

POLL_INTERVAL_S = 0.1
# From the signal to the end of its last process, on a machine that is busy with other things.
END_TIMEOUT_S = 30.0
KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How the processes ended.

    Attributes:
        status: the exit status of the server itself.
        killed: names of those that had to be.
        left: names of those that not even that has ended.
    """

    status: int | None
    took_s: float
    num_processes: int
    killed: tuple[str, ...]
    left: tuple[str, ...]


class ServerProcess:
    """A server on a free port of loopback.

    Args:
        log_path: takes everything that the server and its processes print.
    """

    def __init__(self, log_path: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = log_path
        # A place of Ray's own: no cluster that someone else has started is found there, and its
        # logs and sockets go with it. Short, because a socket's path may not be long.
        self._ray_folder = tempfile.mkdtemp(prefix="llumsched-", dir="/tmp")
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: set[psutil.Process] = set()

    def start(self, command: Sequence[str], *, cwd: Path | None = None, **environment: str) -> None:
        """Start it, with ``environment`` on top of this process's own."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        # Into a file, not a pipe: its end would be held open by every process that inherits it.
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(RAY_TMPDIR=self._ray_folder, **environment),
                # Ctrl-C in the terminal is whose server it is, which then ends it in order. Not a
                # session: while engines have all cores, Linux lets those of others wait.
                process_group=0,
            )

    @property
    def pid(self) -> int:
        """Of the server's own process."""
        assert self._process is not None, "start first"
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status; ``None`` while it runs."""
        return self._process.poll() if self._process is not None else None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self.status is None

    def log(self, from_byte: int = 0) -> str:
        """Text that it has printed since the log was ``from_byte`` long."""
        try:
            return self.log_path.read_bytes()[from_byte:].decode(errors="replace")
        except FileNotFoundError:
            return ""

    def processes(self) -> dict[int, str]:
        """Every process that it has started and that is alive now, itself too, with its name."""
        known = {process.pid for process in self._seen if process.is_running()}
        # In the order of their ids, so that nearly always a parent comes before its children.
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if (
                    process.ppid() in known
                    or process.environ().get("RAY_TMPDIR") == self._ray_folder
                ):
                    known.add(process.pid)
                    self._seen.add(process)
        found = {}
        for process in self._seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                # `is_running` tells a process from another that was given its id.
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = process.name()
        return found

    def end(self, signal_number: signal.Signals = signal.SIGTERM, times: int = 1) -> Ending:
        """Tell the server, and it alone, to end; kill what has not. Safe to call twice."""
        started_s = time.monotonic()
        seen = self.processes()
        for _ in range(times):
            if self._process is not None and self.is_running:
                self._process.send_signal(signal_number)
                time.sleep(POLL_INTERVAL_S)
        self._await_gone(END_TIMEOUT_S)
        took_s = time.monotonic() - started_s
        killed = self.kill()
        self._await_gone(KILL_TIMEOUT_S)
        left = self.processes()
        shutil.rmtree(self._ray_folder, ignore_errors=True)
        return Ending(
            status=self.status,
            took_s=took_s,
            num_processes=len(seen | killed),
            killed=tuple(sorted(killed.values())),
            left=tuple(sorted(left.values())),
        )

    def kill(self) -> dict[int, str]:
        """Kill what is left, at once; which processes that were."""
        found = self.processes()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return found

    def close(self) -> None:
        """The last resort, and the folder: without waiting, and safe to call twice."""
        self.kill()
        shutil.rmtree(self._ray_folder, ignore_errors=True)

    def _await_gone(self, timeout_s: float) -> None:
        wait_until(lambda: not self.is_running and not self.processes(), timeout_s)


def wait_until(holds: Callable[[], bool], timeout_s: float) -> bool:
    """Ask again and again; ``False`` if it does not hold in time."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(POLL_INTERVAL_S)
    return True


def server_environment(**variables: str) -> dict[str, str]:
    """Environment of this process, less what points to a running cluster, plus ``variables``."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return inherited | {"PYTHONUNBUFFERED": "1"} | variables


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
