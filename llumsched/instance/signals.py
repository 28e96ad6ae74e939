"""A signal that is acted on though the main thread never runs Python again.

Python runs its handlers on the main thread, between two of its instructions, and lets only that
thread set them. In an actor Ray keeps the main thread in C++ for good. The one handler of Python's
that needs it for nothing is that of `faulthandler`: on whichever thread takes the signal it writes
where that thread is. Here it writes to a pipe, and that something comes is all that counts.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable

_MAX_TRACEBACK_NUM_BYTES = 1 << 16


def act_on(number: signal.Signals, act: Callable[[], None]) -> None:
    """Have ``act`` called, on a thread of its own, whenever the signal comes; not while it runs."""
    receiver, sender = os.pipe()
    faulthandler.register(number, file=sender, all_threads=False, chain=False)

    def wait() -> None:
        while os.read(receiver, _MAX_TRACEBACK_NUM_BYTES):
            act()

    threading.Thread(target=wait, name=f"on-{number.name}", daemon=True).start()
