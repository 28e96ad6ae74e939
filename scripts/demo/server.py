"""The demo's server: ``llumsched serve`` as a subprocess, and what it says of its progress."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.server_process import POLL_INTERVAL_S, ServerProcess

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

BOOT_TIMEOUT_S = 300.0


class ServerFailed(Exception):
    """The server did not come up, or ended by itself; the message says what it said."""


class Server(ServerProcess):
    """``llumsched serve MODEL *flags`` on a free port of loopback.

    Args:
        flags: each with its value, if it has one: ``--instances 2``.
        log_path: takes everything the server and its processes print.
    """

    def __init__(self, model: str, flags: Sequence[str], log_path: Path) -> None:
        super().__init__(log_path)
        self.command = ["llumsched", "serve", shlex.quote(model), *flags, f"--port {self.port}"]

    def serve(self) -> None:
        """Start it; ``boot`` waits until it serves."""
        self.start([*PROGRAM, *shlex.split(" ".join(self.command[1:]))])

    async def boot(self, on_progress: Callable[[str], None]) -> None:
        """Pass on what the server says until it serves.

        Raises:
            ServerFailed: it ended instead, or took too long.
        """
        num_passed_on = 0
        try:
            async with asyncio.timeout(BOOT_TIMEOUT_S):
                while True:
                    is_running = self.is_running
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
            if not self.is_running:
                raise self._failure()
            await asyncio.sleep(POLL_INTERVAL_S)

    def telling_lines(self, number: int) -> list[str]:
        """The first errors in its log; where it has none, its last lines."""
        lines = [line for line in self._lines() if line]
        errors = [line for line in lines if LOOKS_LIKE_AN_ERROR.search(line)]
        return errors[:number] or lines[-number:]

    def _failure(self) -> ServerFailed:
        """Last words of the server before it ended."""
        refusals = [line for line in self._lines() if line.startswith(REFUSAL)]
        status = f"exit status {self.status}"
        said = refusals[-1].removeprefix(REFUSAL) if refusals else status
        return ServerFailed(f"the server ended: {said}")

    def _lines(self) -> list[str]:
        """The whole lines of its log: of one that is being written, the end is missing."""
        *lines, _ = self.log().split("\n")
        return [COLOUR.sub("", line).rstrip() for line in lines]

    async def _accepts(self) -> bool:
        """True once the server accepts connections; it says so a moment earlier."""
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        return True
