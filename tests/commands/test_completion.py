"""A shell completes every command and its options by what ``llumsched completion`` prints."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("shtab")

from llumsched import cli
from llumsched.commands.completion import SHELLS

COMPLETED = r"""
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
COMP_LINE="${COMP_WORDS[*]}"
COMP_POINT=${#COMP_LINE}
function=$(complete -p llumsched | sed 's/.*-F \([^ ]*\).*/\1/')
$function llumsched "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script that bash is given."""
    printed = subprocess.run(
        [sys.executable, "-m", "llumsched", "completion", "bash"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    path = tmp_path_factory.mktemp("completion") / "llumsched.bash"
    path.write_text(printed.stdout)
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["tra"], {"trace"}),
        (["re"], {"restart", "replay"}),
        (["drain", "--dea"], {"--deadline"}),
        (["top", "--u"], {"--url"}),
    ],
)
def test_bash_completes(script: Path, words: list[str], completed: set[str]) -> None:
    done = subprocess.run(
        ["bash", "-c", COMPLETED, "-", str(script), "llumsched", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {word.strip() for word in done.stdout.split()} == completed, done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_is_in_it(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)
