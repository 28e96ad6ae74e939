"""The command line finds its commands, and costs nothing until one of them runs."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import llumsched
from llumsched import cli
from llumsched.commands import CommandError

ROOT = Path(llumsched.__file__).parents[1]


def install_command(monkeypatch: pytest.MonkeyPatch, **names: object) -> None:
    """Make a module with these names the command 'status'."""
    module = ModuleType("llumsched.commands.status")
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    subparsers.add_parser("status").add_argument("--url", default="here")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_and_version_work_with_nothing_installed(arguments: list[str]) -> None:
    # -S: no site-packages, so that the standard library is all there is.
    command = [sys.executable, "-S", "-m", "llumsched", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "llumsched" in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_module_that_imports_no_engine(name: str) -> None:
    program = (
        f"import sys, llumsched.commands.{name} as module;"
        "assert hasattr(module, 'main') if getattr(module, 'PASSTHROUGH', False)"
        " else hasattr(module, 'add_parser') and hasattr(module, 'run');"
        "print(*sorted({'ray', 'torch', 'vllm', 'transformers'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    listed = {line.split()[0] for line in printed.splitlines() if line.startswith("    ")}
    assert listed >= set(cli.COMMANDS)


def test_no_command_prints_the_help_and_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serv"], "there is no command 'serv'; did you mean 'serve'?"),
        (["xyzzy"], "there is no command 'xyzzy'; commands: serve, "),
        (["--port", "80", "serve"], "unrecognized arguments: --port"),
    ],
)
def test_a_mistake_before_the_command_is_named(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_command_gets_its_parsed_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def run(args: argparse.Namespace) -> int:
        seen.append(args.url)
        return 7

    install_command(monkeypatch, add_parser=add_parser, run=run)
    assert cli.main(["status", "--url", "there"]) == 7
    assert seen == ["there"]


def test_a_passthrough_command_gets_its_arguments_untouched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[str]] = []

    def main(argv: list[str]) -> int:
        seen.append(argv)
        return 3

    install_command(monkeypatch, PASSTHROUGH=True, main=main)
    assert cli.main(["status", "MODEL", "--help", "--", "-x"]) == 3
    assert seen == [["MODEL", "--help", "--", "-x"]]


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (CommandError("port 8000 is in use"), 1, "llumsched: port 8000 is in use\n"),
        (
            ModuleNotFoundError("No module named 'vllm.v1'", name="vllm.v1"),
            1,
            "'status' needs vllm, which is not installed: install llumsched with its extra 'cpu'",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_stops_a_command_is_one_line(
    raised: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise raised

    install_command(monkeypatch, add_parser=add_parser, run=run)
    assert cli.main(["status"]) == status
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == (1 if said else 0)


def test_a_missing_module_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: argparse.Namespace) -> int:
        importlib.import_module("llumsched.no_such_module")
        return 0

    install_command(monkeypatch, add_parser=add_parser, run=run)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        cli.main(["status"])


def test_a_reader_that_leaves_is_no_failure() -> None:
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    program = (
        "import sys, types, llumsched.cli as cli\n"
        "module = types.ModuleType('fake')\n"
        "module.add_parser = lambda subparsers: subparsers.add_parser('status')\n"
        "module.run = lambda args: print('x' * 100_000, flush=True) or 0\n"
        "sys.modules['llumsched.commands.status'] = module\n"
        "sys.exit(cli.main(['status']))\n"
    )
    assert reader.stdin is not None
    with reader.stdin as pipe:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            stdout=pipe,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_mistyped_flag_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["simulate", "example", "--instnces", "2"])
    assert "did you mean --instances?" in capsys.readouterr().err


def test_nothing_is_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    """The next flag that is added would change what it means."""
    with pytest.raises(SystemExit):
        cli.main(["simulate", "example", "--hardwar", "2"])
    assert "did you mean --hardware?" in capsys.readouterr().err
