"""The other commands of the docs: those of make, Python, pip, pytest and Ray.

Commands of ours are looked at elsewhere: operators' are run against a server that answers
(``tests/commands/test_documented.py``), ``serve`` is read by vLLM's parser and ours
(``tests/frontend/test_documented_flags.py``), all by our own (``tests/project/test_docs.py``).
Here nothing is installed, built or started: make says what it would do, Ray's own parser reads the
flags, and of the others it is looked up whether what they name is there. A command of another
program fails, so that whoever documents it says here how it is checked.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess

import pytest

from tests.project.test_docs import PAGES
from tests.wheels import ROOT

BLOCK = re.compile(r"^ {0,3}```(?P<kind>[^\n]*)\n(?P<body>.*?)^ {0,3}```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
PROGRAMS = ("make", "python", "pip", "pytest", "ray", "git", "docker", "helm", "kubectl", "curl")
SETTING = re.compile(r"(?P<name>[A-Z][A-Z0-9_]*)=(?P<value>.*)", re.DOTALL)
START = re.compile(rf"((?:[A-Z][A-Z0-9_]*=\S+ )*)(?:{'|'.join(PROGRAMS)})(?: |$)")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def lines() -> set[str]:
    """Whatever looks like a command of one of these programs, in a block or within a sentence."""
    found: set[str] = set()
    for path in (*PAGES, ROOT / "CONTRIBUTING.md"):
        text = path.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            if block["kind"].strip() in ("", "sh", "bash", "console", "text"):
                body = block["body"].replace("\\\n", " ")
                found |= {line.strip().removeprefix("$ ") for line in body.splitlines()}
        found |= set(INLINE.findall(BLOCK.sub("", text).replace("\n", " ")))
    commands = {line.partition(" # ")[0].strip() for line in found if START.match(line)}
    return commands - set(PROGRAMS) | {"make"}  # a program's name alone is a word of a sentence


def split(line: str) -> tuple[dict[str, str], list[str]]:
    """Settings before the program, and the words of the command."""
    words = shlex.split(line)
    settings: dict[str, str] = {}
    while match := SETTING.fullmatch(words[0]):
        settings[match["name"]] = match["value"]
        words.pop(0)
    return settings, words


COMMANDS = sorted(lines())


@pytest.mark.parametrize("line", COMMANDS)
def test_what_it_names_is_there(line: str) -> None:
    settings, words = split(line)
    for name in settings:
        assert is_read(name), f"nothing reads {name}"
    program, *arguments = words
    checks = {"make": check_make, "python": check_python, "pip": check_pip, "pytest": check_pytest}
    checks |= {"ray": check_ray, "git": check_git}
    assert program in checks, f"say how a command of {program} is checked"
    checks[program](arguments)


def is_read(name: str) -> bool:
    """True if code or tests read this variable."""
    folders = ("llumsched", "tests", "scripts", "benchmarks", "simulator")
    files = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return any(f'"{name}"' in path.read_text(encoding="utf-8") for path in files)


def check_make(arguments: list[str]) -> None:
    """Make says what it would do, with variables that the Makefile has."""
    for argument in arguments:
        if match := SETTING.fullmatch(argument):
            assert re.search(rf"^{match['name']} \?=", MAKEFILE, re.MULTILINE), argument
    done = subprocess.run(
        ("make", "--dry-run", "VENV=.venv-not-there", *arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def check_python(arguments: list[str]) -> None:
    """A module that is there; of pytest, what pytest is given."""
    assert arguments[0] == "-m"
    if arguments[1] == "pytest":
        check_pytest(arguments[2:])
    elif arguments[1] == "pip":
        check_pip(arguments[2:])
    else:
        assert importlib.util.find_spec(arguments[1]) is not None, arguments[1]


def check_pip(arguments: list[str]) -> None:
    """An installation of this project, with extras that it has."""
    assert arguments[0] in ("install", "uninstall")
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for extras in re.findall(r"\[([a-z,]+)\]", " ".join(arguments)):
        for extra in extras.split(","):
            assert re.search(rf'^        "{extra}": ', setup, re.MULTILINE), extra


def check_pytest(arguments: list[str]) -> None:
    """Paths that are there; a file of the page itself stands for one of the reader's."""
    for argument in arguments:
        if argument.startswith("tests/"):
            assert (ROOT / argument.partition("::")[0]).exists(), argument


def check_ray(arguments: list[str]) -> None:
    """Ray's own parser reads the flags."""
    scripts = pytest.importorskip("ray.scripts.scripts")
    name, *flags = arguments
    command = scripts.cli.commands[name]
    command.make_context(name, list(flags), resilient_parsing=False)


def check_git(arguments: list[str]) -> None:
    """Where from is not said before there is an address."""
    assert arguments[:2] == ["clone", "…"]


def test_there_are_commands_of_each_kind() -> None:
    assert {split(line)[1][0] for line in COMMANDS} >= {"make", "python", "pip", "pytest", "ray"}
    assert shutil.which("make")
