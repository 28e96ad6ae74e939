"""``llumsched serve`` as a program in the foreground: it says how far it is, and Ctrl-C
and SIGTERM end it."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable

logger = logging.getLogger(__name__)

# The name, in log lines, of the process that starts the others.
PROCESS = "llumsched"


def on_signals(handler: Callable[..., None] | signal.Handlers) -> None:
    """Handle Ctrl-C and SIGTERM. While vLLM's server runs, they are its own."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def interrupt(*_: object) -> None:
    """While booting: unwind at once, though the loop is blocked; a second signal must not
    interrupt what ends the processes."""
    on_signals(signal.SIG_IGN)
    raise KeyboardInterrupt


def progress(sentence: str) -> None:
    """Log a sentence for whoever waits."""
    logger.info("%s", sentence, stacklevel=2)
