"""The process of a frontend; started by ``processes``, never by hand.

    python -m llumsched.frontend.workers PLACE CHANNEL PLAN

The last two are file descriptors that it inherits. The libraries are loaded at once; the plan is
read when the launcher tells how the pool is, which it does when all else is up.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import traceback

from prometheus_client import values

from llumsched.engine.vllm.notices import put_right
from llumsched.frontend.workers.channel import METRICS_FOLDER, Channel
from llumsched.wire.names import frontend_id


def main(argv: list[str]) -> None:
    index, channel_descriptor, plan_descriptor = map(int, argv)
    if METRICS_FOLDER in os.environ:
        # Before any metric is made: the successor in this place goes on with its counts.
        values.ValueClass = values.MultiProcessValue(lambda: index)  # type: ignore[no-untyped-call]
    channel = Channel(socket.socket(fileno=channel_descriptor))
    put_right()  # before vLLM is imported
    import uvloop

    from llumsched.frontend.workers import worker
    from llumsched.frontend.workers.launcher_client import LauncherClient

    status = 0
    try:
        supervision = LauncherClient(channel, frontend_id(index))
        supervision.await_status()
        # The plan comes from the process that has started this one, as its command line does.
        plan = pickle.loads(os.pread(plan_descriptor, os.fstat(plan_descriptor).st_size, 0))
        uvloop.run(worker.serve(plan, index, supervision))
    except Exception:
        traceback.print_exc()
        status = 1
    # As for the whole server: the finalizers of the libraries take seconds, or wait for ever.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
