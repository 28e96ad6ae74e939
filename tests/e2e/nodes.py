"""A Ray cluster of several nodes on this machine, each with an address of its own on loopback."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from scripts.server_process import POLL_INTERVAL_S, free_port, server_environment
from tests.e2e.servers import OFFLINE

START_TIMEOUT_S = 60.0


class Nodes:
    """Use as a context manager: all processes of all nodes end with it.

    Attributes:
        address: of the cluster.
        environment: what whoever attaches to it needs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Ray's sockets have long names: their folder must not.
        self._ray_folder = tempfile.mkdtemp(prefix="llumsched-")
        self.address = f"{address_of(0)}:{free_port()}"
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        self._sessions: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number in reversed(range(len(self._sessions))):
            self.end(number)
        shutil.rmtree(self._ray_folder, ignore_errors=True)

    def add(self, *, num_cpus: int) -> str:
        """Start a node; its address. The first is the head."""
        number = len(self._sessions)
        ip = address_of(number)
        if number == 0:
            port = self.address.rpartition(":")[2]
            where = ["--head", f"--port={port}", "--include-dashboard=false"]
        else:
            where = [f"--address={self.address}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *where, "--block"]
        command += [f"--node-ip-address={ip}", f"--num-cpus={num_cpus}", "--disable-usage-stats"]
        path = self._folder / f"ray-node-{number}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(**OFFLINE, RAY_TMPDIR=self._ray_folder, **self.environment),
                start_new_session=True,
            )
        self._sessions.append(process)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in path.read_text():
            assert process.poll() is None, path.read_text()
            assert time.monotonic() < deadline_s, path.read_text()
            time.sleep(POLL_INTERVAL_S)
        return ip

    def drain(self, ip: str) -> None:
        """Announce that the machine of an address goes, as a cloud does that takes it back."""
        found = self._python(
            "import ray, sys\n"
            "ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False)\n"
            "(node,) = (n for n in ray.nodes() if n['NodeManagerAddress'] == sys.argv[2])\n"
            "print(node['NodeID'])",
            ip,
        )
        self._python(
            "import sys\nfrom ray.scripts.scripts import cli\n"
            "cli(['drain-node', '--address', sys.argv[1], '--node-id', sys.argv[2], '--reason',"
            " 'DRAIN_NODE_REASON_PREEMPTION', '--reason-message', 'a test',"
            " '--deadline-remaining-seconds', '300'])",
            found,
        )

    def _python(self, code: str, argument: str) -> str:
        """The last line that a program prints which knows the cluster's address."""
        done = subprocess.run(
            [sys.executable, "-c", code, self.address, argument],
            capture_output=True,
            text=True,
            env=server_environment(**OFFLINE, **self.environment),
            timeout=START_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().rpartition("\n")[2]

    def runs(self, number: int) -> bool:
        """True if a node takes part in the cluster: what started it stays when its raylet ends."""
        return any(process.info["name"] == "raylet" for process in self._processes(number))

    def end(self, number: int) -> None:
        """End every process of a node at once, as when its machine loses power."""
        for process in self._processes(number):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._sessions[number].wait(START_TIMEOUT_S)

    def _processes(self, number: int) -> list[psutil.Process]:
        session, found = self._sessions[number].pid, []
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(process.pid) == session:
                    found.append(process)
        return found


def address_of(number: int) -> str:
    """The address of a node. Ray takes 127.0.0.1 for no address, and looks for another."""
    return f"127.0.0.{number + 2}"
