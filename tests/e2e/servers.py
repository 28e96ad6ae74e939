"""Servers under test: each a subprocess, and what tests wait for of it."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from scripts.server_process import POLL_INTERVAL_S, Ending, ServerProcess, wait_until

CHECKOUT = Path(__file__).parents[2]

BOOT_TIMEOUT_S = 300.0
THAT_TIMEOUT_S = 30.0
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
# Of the server that has one.
# Of the pool of two frontends: sequences an engine, and an adapter.
MAX_NUM_SEQS = 4
ADAPTER = "of-the-tests"
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


class Server(ServerProcess):
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
        super().__init__(folder / f"{name}.log")
        self.name = name
        self.arguments = tuple(arguments)
        command = [sys.executable, "-m", *arguments, f"--port={self.port}"]
        self.start(command, cwd=CHECKOUT, **OFFLINE, **(environment or {}))
        RUNNING.append(self)
        self._booted_by_s = time.monotonic() + BOOT_TIMEOUT_S

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
        assert wait_until(holds, THAT_TIMEOUT_S), f"not in time: {what}\n{self._tail()}"

    def _await_next(self, what: str) -> None:
        status = self.status
        assert status is None, f"{self.name} ended with {status} before {what}:\n{self._tail()}"
        assert time.monotonic() < self._booted_by_s, f"not in time: {what}\n{self._tail()}"
        time.sleep(POLL_INTERVAL_S)

    def _tail(self) -> str:
        return self.log()[-4000:]

    def end(self, signal_number: signal.Signals = signal.SIGTERM, times: int = 1) -> Ending:
        ending = super().end(signal_number, times)
        assert not ending.left, f"{self.name} could not be ended: {ending.left}"
        if self in RUNNING:
            RUNNING.remove(self)
        return ending


def llumsched(model: str, folder: Path, *flags: str, name: str = "llumsched", **env: str) -> Server:
    """``llumsched serve``, with the engine's flags of these tests."""
    return Server(name, ["llumsched", "serve", model, *ENGINE_FLAGS, *flags], folder, env)


def plain_vllm(model: str, folder: Path, name: str = "plain-vllm") -> Server:
    """``vllm serve`` as it is, with the same flags."""
    module = "vllm.entrypoints.launchers.api_server.entry"
    return Server(name, [module, f"--model={model}", *ENGINE_FLAGS], folder)
