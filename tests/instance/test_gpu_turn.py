"""Turns at a GPU, taken by processes that end in any way."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llumsched.instance.gpu_turn import gpu_turn

TAKE_A_TURN = """
import sys
from pathlib import Path
from llumsched.instance.gpu_turn import gpu_turn
with gpu_turn({"CUDA_VISIBLE_DEVICES": "0"}, Path(sys.argv[1])):
    print("here", flush=True)
    sys.stdin.read()
"""
GPU_0 = {"CUDA_VISIBLE_DEVICES": "0"}


class Waiting:
    """Another instance of a GPU, which waits for its turn on a thread."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.has_begun = threading.Event()
        self._environment, self._folder = environment, folder
        self._thread = threading.Thread(target=self._boot, daemon=True)
        self._thread.start()

    def _boot(self) -> None:
        with gpu_turn(self._environment, self._folder):
            self.has_begun.set()


def test_one_gpu_has_one_turn_at_a_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    said = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: said.set()  # type: ignore[method-assign]
    logging.getLogger("llumsched.instance.gpu_turn").addHandler(handler)
    try:
        with gpu_turn(GPU_0, tmp_path):
            other = Waiting(GPU_0, tmp_path)
            assert said.wait(10)
            assert not other.has_begun.is_set()
        assert other.has_begun.wait(10)
    finally:
        logging.getLogger("llumsched.instance.gpu_turn").removeHandler(handler)
    assert "Waits for another instance on GPU 0 to boot" in caplog.text


@pytest.mark.parametrize(
    "environment",
    [{"CUDA_VISIBLE_DEVICES": "1"}, {"CUDA_VISIBLE_DEVICES": "GPU-5e/../0"}, {}],
)
def test_other_gpus_have_turns_of_their_own(environment: dict[str, str], tmp_path: Path) -> None:
    with gpu_turn(GPU_0, tmp_path):
        assert Waiting(environment, tmp_path).has_begun.wait(10)


def test_the_turn_of_a_killed_process_is_over(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TAKE_A_TURN, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"here\n"
    waiting = Waiting(GPU_0, tmp_path)
    assert not waiting.has_begun.is_set()
    other.kill()
    assert waiting.has_begun.wait(10)
    other.communicate()


def test_a_folder_that_cannot_be_used_keeps_nobody_from_booting(tmp_path: Path) -> None:
    taken = tmp_path / "a file"
    taken.touch()
    with gpu_turn(GPU_0, taken), gpu_turn(GPU_0, taken):
        pass
