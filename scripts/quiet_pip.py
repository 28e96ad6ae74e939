"""Run pip, and show how far it is in one line instead of hundreds.

    python -m scripts.quiet_pip install -e .

On a terminal the line is written over itself; elsewhere a line comes now and then. What pip says is
kept in a file, and its end is shown when pip fails, with the arguments that help where the cause is
known. The exit status is pip's. The standard library is all this needs: it runs in a virtual
environment that has nothing yet.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

INTERVAL_S = 15.0
TAIL_NUM_LINES = 25
WIDTH = 78

COLLECTING = re.compile(r"Collecting (?P<name>[\w.-]+)")
DOWNLOADING = re.compile(r"Downloading (?:\S*/)?(?P<name>[^\s/]+)(?: \((?P<size>[^)]+)\))?")
INSTALLING = re.compile(r"Installing collected packages: (?P<names>.+)")
BUILDING = re.compile(r"Building wheels? for (?:collected packages: )?(?P<name>[\w.-]+)")

# Parts of what pip says when it fails, and what to do then.
NO_CPU_TORCH = re.compile(r"(?:No matching distribution found for|depends on) torch\w*==\S*\+cpu")
NO_CERTIFICATE = re.compile(r"CERTIFICATE_VERIFY_FAILED")
NO_NETWORK = re.compile(
    r"connection broken by|NewConnectionError|ProxyError|Temporary failure in name resolution"
)
# Causes, each before those that it brings along; in words; and the arguments, of which one helps.
ADVICE = (
    (NO_CERTIFICATE, "pip does not trust the certificate of the package index", ("--cert FILE",)),
    (
        NO_NETWORK,
        "pip did not reach the package index",
        (
            "--proxy http://HOST:PORT",
            "--index-url https://MIRROR/simple",
            "--no-index --find-links FOLDER-OF-WHEELS",
        ),
    ),
    (
        NO_CPU_TORCH,
        "the package index has no CPU build of torch, PyTorch's own has",
        ("--extra-index-url https://download.pytorch.org/whl/cpu",),
    ),
)


class Progress:
    """Pip's doings, in words, from the lines that it prints."""

    def __init__(self) -> None:
        self.num_packages = 0
        self.doing = "starting"

    def heard(self, line: str) -> None:
        """Take in one line of pip's."""
        text = line.strip()
        if match := COLLECTING.match(text):
            self.num_packages += 1
            self.doing = f"collecting {match['name']}"
        elif match := DOWNLOADING.match(text):
            size = f" ({match['size']})" if match["size"] else ""
            self.doing = f"downloading {match['name']}{size}"
        elif match := INSTALLING.match(text):
            self.doing = f"installing {len(match['names'].split(','))} packages"
        elif match := BUILDING.match(text):
            self.doing = f"building {match['name']}"

    def sentence(self, seconds: float) -> str:
        """One line that fits a terminal."""
        return f"  {seconds:4.0f} s, {self.num_packages} packages: {self.doing}"[:WIDTH]


def show(lines: Iterable[str], log: TextIO, out: TextIO) -> None:
    """Read pip's lines until there are no more, keep them in ``log``, and show progress."""
    progress = Progress()
    started_s = said_s = time.monotonic()
    for line in lines:
        log.write(line)
        progress.heard(line)
        now_s = time.monotonic()
        if out.isatty():
            out.write("\r" + progress.sentence(now_s - started_s).ljust(WIDTH))
            out.flush()
        elif now_s - said_s >= INTERVAL_S:
            said_s = now_s
            out.write(progress.sentence(now_s - started_s) + "\n")
            out.flush()
    if out.isatty():
        out.write("\r" + " " * WIDTH + "\r")
    out.write(f"  done after {time.monotonic() - started_s:.0f} s\n")


def advice(said: str) -> str:
    """The arguments for pip that help, in words, from all that a pip which failed has said.

    Only the first cause that applies is named: without a network no torch is found either. The
    text is empty if no cause is known.
    """
    for cause, words, choices in ADVICE:
        if cause.search(said):
            lines = "".join(f'  make demo PIP_ARGS="{arguments}"\n' for arguments in choices)
            helps = "What helps" if len(choices) == 1 else "One of these helps"
            return f"\nThe cause: {words}. {helps} (also with make install, make test):\n{lines}"
    return ""


def main(arguments: Sequence[str]) -> int:
    """Run ``pip`` with these arguments; its exit status."""
    command = [sys.executable, "-m", "pip", *arguments]
    options = ["--disable-pip-version-check", "--no-color", "--progress-bar", "off"]
    descriptor, path = tempfile.mkstemp(prefix="llumsched-pip-", suffix=".log")
    with os.fdopen(descriptor, "w+", encoding="utf-8") as log:
        with subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as pip:
            assert pip.stdout is not None
            show(pip.stdout, log, sys.stdout)
        if pip.returncode:
            log.flush()
            log.seek(0)
            said = log.readlines()
            sys.stderr.writelines(said[-TAIL_NUM_LINES:])
            sys.stderr.write(f"pip failed ({' '.join(command)}); all that it said: {path}\n")
            sys.stderr.write(advice("".join(said)))
        else:
            Path(path).unlink()
    return pip.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
