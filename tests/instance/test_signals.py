"""A process whose main thread never comes back to Python still acts on a signal."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]

# As an actor's: the main thread waits in C, and all that is ours runs on others.
PROGRAM = """
import ctypes, os, signal, threading
from llumsched.instance.signals import act_on

signal.signal(signal.SIGTERM, lambda *_: None)

def begin():
    act_on(signal.SIGTERM, lambda: os._exit(7))
    print("ready", flush=True)

threading.Thread(target=begin).start()
while True:
    ctypes.CDLL(None).pause()
"""


def test_a_signal_is_acted_on_while_the_main_thread_is_in_c() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=CHECKOUT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 7
