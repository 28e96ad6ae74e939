"""A process of its own for one of several frontends; started by ``launcher``, never by hand.

    python -m llumsched.frontend.workers PLACE CHANNEL PLAN

The last two are file descriptors that it inherits.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import traceback

from prometheus_client import values

from llumsched.frontend.workers.channel import Channel


def main(argv: list[str]) -> None:
    index, channel_descriptor, plan_descriptor = map(int, argv)
    # Before any metric is made: whoever takes this place next goes on with its counts.
    values.ValueClass = values.MultiProcessValue(lambda: index)  # type: ignore[no-untyped-call]
    channel = Channel(socket.socket(fileno=channel_descriptor))
    # It comes from the process that has started this one, as its command line does.
    plan = pickle.loads(os.pread(plan_descriptor, os.fstat(plan_descriptor).st_size, 0))
    import uvloop

    from llumsched.frontend.workers import worker as member

    status = 0
    try:
        uvloop.run(member.serve(plan, index, channel))
    except Exception:
        traceback.print_exc()
        status = 1
    # As for the whole server: the finalizers of the libraries take seconds, or wait for ever.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
