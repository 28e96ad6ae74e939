"""A signal that is acted on though the main thread never runs Python again.

Python runs its handlers on the main thread, between two of its instructions. In an actor Ray keeps
that thread in C++ for good, so a handler set the usual way is never called. What the interpreter
does at once, on whichever thread the signal meets, is to write its number to a file descriptor.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable


def act_on(number: signal.Signals, act: Callable[[], None]) -> None:
    """Have ``act`` called on a thread of its own whenever the signal comes.

    To be called on the main thread, and for one signal of a process only.
    """
    sender, receiver = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
    # Any handler of Python's own will do: without one nothing is written.
    signal.signal(number, lambda *_: None)

    def wait() -> None:
        while numbers := receiver.recv(1):
            if numbers[0] == number:
                act()

    threading.Thread(target=wait, name=f"on-{number.name}", daemon=True).start()
