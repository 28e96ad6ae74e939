"""The processes of the frontends: started, watched, ended.

All inherit the socket that clients connect to, which the launcher holds as well: a connection that
no frontend has taken yet waits there, whichever of them dies. What several count lies in
files that the one which comes after goes on with; one alone counts from zero, as any server does
that was started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

from ray import cloudpickle
from vllm.transformers_utils.config import maybe_register_config_serialize_by_value

from llumsched.frontend.workers.channel import METRICS_FOLDER, Channel
from llumsched.frontend.workers.launcher_server import LauncherServer
from llumsched.frontend.workers.worker import LOAD_NUM_BYTES, FrontendPlan, connections_of_all

# To vLLM's servers, the load of one that takes no connection.
TAKES_NONE = 2**31 - 1
KILL_TIMEOUT_S = 5.0


def _memory(name: str) -> BinaryIO:
    """Memory that children can inherit: keys are in no file."""
    return os.fdopen(os.memfd_create(f"llumsched-{name}"), "w+b")


class WorkerProcess:
    """Implements ``frontend_supervisor.FrontendProcess``."""

    def __init__(self, process: subprocess.Popen[bytes], index: int, hub: LauncherServer) -> None:
        self._process = process
        self._index = index
        self._hub = hub

    @property
    def pid(self) -> int:
        return self._process.pid

    def serves(self) -> bool:
        """True if the frontend has begun to take requests."""
        return self._hub.serves(self._index)

    def end_reason(self) -> str | None:
        """``None`` while it runs, else why it ended."""
        status = self._process.poll()
        if status is None:
            return None if self._hub.has(self._index) else "it does not hear"
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}"
        return f"its process ended with status {status}"

    def terminate(self) -> None:
        """Ask it to end."""
        if self._process.poll() is None:
            self._process.terminate()

    def end_by(self, deadline_s: float) -> None:
        """Wait until it has ended; at the deadline (``time.monotonic``) end it at once."""
        try:
            self._process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_TIMEOUT_S)


class FrontendCleanup(Protocol):
    """Ends what a dead frontend has left.

    ``metrics_folder`` is where the processes keep what they count.
    """

    @property
    def metrics_folder(self) -> Path: ...

    def forget_frontend(self, client_index: int) -> Callable[[], bool]: ...


class WorkerProcesses:
    """Implements ``frontend_supervisor.Host``. Use as a context manager: leaving it ends them all.

    A process that was started loads its libraries and then waits for the plan, so frontends and
    instances boot side by side.

    Args:
        listener: the socket that clients connect to.
        closing_timeout_s: how long they may take to end when they are asked to.
    """

    def __init__(
        self,
        num_frontends: int,
        listener: socket.socket,
        hub: LauncherServer,
        pool: FrontendCleanup,
        *,
        closing_timeout_s: float,
    ) -> None:
        self._hub = hub
        self._pool = pool
        self._closing_timeout_s = closing_timeout_s
        self._running: dict[int, WorkerProcess] = {}
        with contextlib.ExitStack() as stack:
            loads = stack.enter_context(_memory("loads"))
            loads.write(bytes(LOAD_NUM_BYTES * num_frontends))
            loads.flush()
            self._loads = connections_of_all(loads.fileno(), num_frontends)
            self._plan = stack.enter_context(_memory("plan"))
            self._stack = stack.pop_all()
        for index in range(num_frontends):
            self._loads[index] = TAKES_NONE
        self._inherited = (listener.fileno(), loads.fileno(), self._plan.fileno())
        self._environment = dict(os.environ)
        if num_frontends > 1:
            self._environment[METRICS_FOLDER] = str(pool.metrics_folder)

    def publish(self, make_plan: Callable[[int, int], FrontendPlan]) -> None:
        """Give every frontend, also those to come, its plan; before the hub tells any of the pool.

        Args:
            make_plan: the plan, given the descriptors of listener and loads.
        """
        listener, loads, _ = self._inherited
        maybe_register_config_serialize_by_value()
        self._plan.write(cloudpickle.dumps(make_plan(listener, loads)))
        self._plan.flush()

    async def __aenter__(self) -> WorkerProcesses:
        return self

    async def __aexit__(self, *_: object) -> None:
        deadline_s = time.monotonic() + self._closing_timeout_s
        running = list(self._running.values())
        for child in running:
            child.terminate()
        for child in running:
            await asyncio.to_thread(child.end_by, deadline_s)
        for index in list(self._running):
            self._hub.leave(index)
        self._stack.close()

    def start(self, index: int) -> WorkerProcess:
        """Begin to start a frontend."""
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = (theirs.fileno(), self._plan.fileno())
            process = subprocess.Popen(
                [
                    sys.executable,
                    *("-m", "llumsched.frontend.workers"),
                    *map(str, (index, *descriptors)),
                ],
                stdin=subprocess.DEVNULL,
                env=self._environment,
                pass_fds=(theirs.fileno(), *self._inherited),
                # A Ctrl-C is for the launcher, which ends it in its turn.
                process_group=0,
            )
        self._hub.join(index, Channel(ours))
        child = self._running[index] = WorkerProcess(process, index, self._hub)
        return child

    def forget(self, index: int) -> Callable[[], bool]:
        """Begin to end all that a dead frontend has left."""
        self._running.pop(index, None)
        self._hub.leave(index)
        self._loads[index] = TAKES_NONE
        return self._pool.forget_frontend(index)
