"""The demo's server: ``llumsched serve`` as a subprocess, from its first line to its last process.

Invariant: when ``stop`` returns, no process that the server started is left, whatever happened to
the server. They are found by a mark in their environment, which children inherit, so that even one
whose parent is gone is found; nothing else on the machine is ever signalled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# What `llumsched serve` says of its progress, by the modules that say it: vLLM's lines have the
# same shape.
OURS = re.compile(
    r"\(llumsched pid=\d+\) \S+ \S+ \S+ \[(?:serve|pool|launcher)\.py:\d+\] (?P<sentence>.*)"
)
REFUSAL = "llumsched serve: "
READY = "serving "

PROGRAM = (sys.executable, "-m", "llumsched")

LOOKS_LIKE_AN_ERROR = re.compile(r"\b(ERROR|CRITICAL)\b|^\S*Error: |\bended: ")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")

MARK = "LLUMSCHED_DEMO_RUN"
BOOT_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0
LEAVE_TIMEOUT_S = 5.0
POLL_INTERVAL_S = 0.1


class ServerFailed(Exception):
    """The server did not come up, or ended by itself; the message says what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How the processes ended: how many there were, which had to be killed, which are left."""

    num_processes: int
    killed: tuple[str, ...]
    left: tuple[str, ...]


class Server:
    """``llumsched serve MODEL *flags`` on a free port of loopback.

    Args:
        flags: each with its value, if it has one: ``--instances 2``.
        log_path: takes everything the server and its processes print.
    """

    def __init__(self, model: str, flags: Sequence[str], log_path: Path) -> None:
        self.log_path = log_path
        # A place of Ray's own: no cluster that someone else has started is found there, and its
        # logs and sockets go with it. Short, because a socket's path may not be long.
        self._ray_folder = tempfile.TemporaryDirectory(
            prefix="llumsched-demo-", dir="/tmp", ignore_cleanup_errors=True
        )
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.command = ["llumsched", "serve", shlex.quote(model), *flags, f"--port {port}"]
        self._mark = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; ``boot`` waits until it serves."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        # Into a file, not a pipe: its end would be held open by every process that inherits it.
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*PROGRAM, *shlex.split(" ".join(self.command[1:]))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal is the demo's, which then ends the server in order. Not a
                # session: while engines have all cores, Linux lets those of others wait.
                process_group=0,
                env=self._environment(),
            )

    async def boot(self, on_progress: Callable[[str], None]) -> None:
        """Pass on what the server says until it serves.

        Raises:
            ServerFailed: it ended instead, or took too long.
        """
        num_passed_on = 0
        try:
            async with asyncio.timeout(BOOT_TIMEOUT_S):
                while True:
                    is_running = self._is_running()
                    found = map(OURS.fullmatch, self._lines())
                    said = [match["sentence"] for match in found if match is not None]
                    for sentence in said[num_passed_on:]:
                        on_progress(sentence)
                    num_passed_on = len(said)
                    if said and said[-1].startswith(READY) and await self._accepts():
                        return
                    if not is_running:
                        raise self._failure()
                    await asyncio.sleep(POLL_INTERVAL_S)
        except TimeoutError:
            raise ServerFailed(f"the server was not up within {BOOT_TIMEOUT_S:.0f} s") from None

    async def ended(self) -> None:
        """Return never: raise ``ServerFailed`` when the server ends."""
        while True:
            if not self._is_running():
                raise self._failure()
            await asyncio.sleep(POLL_INTERVAL_S)

    def telling_lines(self, number: int) -> list[str]:
        """The first errors in its log; where it has none, its last lines."""
        lines = [line for line in self._lines() if line]
        errors = [line for line in lines if LOOKS_LIKE_AN_ERROR.search(line)]
        return errors[:number] or lines[-number:]

    async def stop(self) -> Ending:
        """End the server, then whatever it may have left behind."""
        seen = self.processes()
        if self._process is not None and self._is_running():
            self._process.terminate()
            await self._wait_until(lambda: not self._is_running(), STOP_TIMEOUT_S)
        await self._wait_until(lambda: not self.processes(), LEAVE_TIMEOUT_S)
        killed = self.kill()
        await self._wait_until(lambda: not self.processes(), LEAVE_TIMEOUT_S)
        return Ending(
            num_processes=len(seen | killed),
            killed=tuple(sorted(killed.values())),
            left=tuple(sorted(self.processes().values())),
        )

    def processes(self) -> dict[int, str]:
        """Every process of this server that is alive now, with its name."""
        mark = f"{MARK}={self._mark}".encode()
        found: dict[int, str] = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and mark in _read(folder / "environ").split(b"\0"):
                found[int(folder.name)] = _read(folder / "comm").decode(errors="replace").strip()
        return found

    def kill(self) -> dict[int, str]:
        """Kill what is left, at once; which processes that were."""
        found = self.processes()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return found

    def close(self) -> None:
        """The last resort, and the folder: also without an event loop, and safe to call twice."""
        self.kill()
        self._ray_folder.cleanup()

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return inherited | {
            MARK: self._mark,
            "RAY_TMPDIR": self._ray_folder.name,
            "PYTHONUNBUFFERED": "1",
        }

    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _failure(self) -> ServerFailed:
        """Last words of the server before it ended."""
        assert self._process is not None, "start first"
        refusals = [line for line in self._lines() if line.startswith(REFUSAL)]
        status = f"exit status {self._process.returncode}"
        said = refusals[-1].removeprefix(REFUSAL) if refusals else status
        return ServerFailed(f"the server ended: {said}")

    def _lines(self) -> list[str]:
        """The whole lines of its log: of one that is being written, the end is missing."""
        *lines, _ = _read(self.log_path).decode(errors="replace").split("\n")
        return [COLOUR.sub("", line).rstrip() for line in lines]

    async def _accepts(self) -> bool:
        """True once the server accepts connections; it says so a moment earlier."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            return False
        writer.close()
        return True

    @staticmethod
    async def _wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while True:
                    if condition():
                        return
                    await asyncio.sleep(POLL_INTERVAL_S)


def _read(path: Path) -> bytes:
    """A file; empty if it is not there, as is one of a process that is gone or another user's."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
