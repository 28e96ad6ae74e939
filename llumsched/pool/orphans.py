"""No process outlives the server that started it, however that ends.

Ray's own daemons end with the process that started them, but not what these have started: killed
with SIGKILL, a server would leave Ray's agents behind. So a process that does nothing else waits
for the end of the server, in a session of its own. Then it ends every process of this machine whose
environment names the pool, as that of each child does, and of each child's child.

    python -I -S orphans.py POOL_ID        # its standard input is closed when the server ends

Run like this the module uses nothing but the standard library. It does not know Ray.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

POOL_ID = "LLUMSCHED_POOL_ID"
# One that is being started when its parent is killed is found a moment later.
NUM_LOOKS = 20
LOOK_INTERVAL_S = 0.1
NUM_EMPTY_LOOKS = 3
END_TIMEOUT_S = NUM_LOOKS * LOOK_INTERVAL_S + 3.0


class OrphanWatch:
    """From ``start`` on, what this process starts ends with it. ``close`` ends what is left."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Name the pool in the environment, and begin to wait."""
        environment = {name: value for name, value in os.environ.items() if name != POOL_ID}
        os.environ[POOL_ID] = pool_id = secrets.token_hex(16)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__)), pool_id],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment,
            # What ends a whole group or session of processes must not end this one first.
            start_new_session=True,
        )

    @property
    def pid(self) -> int | None:
        """The process that waits."""
        return self._process.pid if self._process is not None else None

    def close(self) -> None:
        """End whatever is left; safe to call twice."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        os.environ.pop(POOL_ID, None)


def members(pool_id: str) -> list[int]:
    """The processes of this user whose environment names the pool."""
    wanted = f"{POOL_ID}={pool_id}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def end_all(pool_id: str) -> None:
    """Kill the processes of a pool, until there are none."""
    num_empty = 0
    for _ in range(NUM_LOOKS):
        found = members(pool_id)
        num_empty = 0 if found else num_empty + 1
        if num_empty == NUM_EMPTY_LOOKS:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(LOOK_INTERVAL_S)


def main(pool_id: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(sys.stdin.fileno(), 1):
        pass
    end_all(pool_id)


if __name__ == "__main__":
    main(sys.argv[1])
