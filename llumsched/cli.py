"""The command line: ``llumsched COMMAND ...``.

Each subcommand is a module of :mod:`llumsched.commands`, imported only when it is the one that
runs: the commands are the one place that may know both hosts, the Ray runtime and the simulator,
and ``--help`` costs neither. Nothing here parses arguments on behalf of a subcommand.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType, ModuleType

from llumsched import __version__
from llumsched.commands import CommandError
from llumsched.flags import Parser

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "serve": "serve a model on several vLLM instances behind one OpenAI endpoint",
        "frontend": "add an HTTP frontend to a running server, on any machine of its Ray cluster",
        "status": "show the instances of a running server, their load and their requests",
        "top": "watch a running server in the terminal: instances, requests, migrations",
        "trace": "show what became of a request: queue, dispatch, migrations, resumptions",
        "migrate": "move a running request to another instance",
        "drain": "empty an instance and end it; its requests go on elsewhere",
        "scale": "start or drain instances until there are N",
        "restart": "replace every instance in turn while the pool serves",
        "batch": "serve files and batches of requests, and do them in idle room of an endpoint",
        "jobs": "list scheduled jobs and their history; pause, resume, or run one now",
        "policies": "list the scheduling policies that are installed, with their parameters",
        "simulate": "simulate a trace under one policy or several, on modelled hardware",
        "sweep": "simulate a grid of settings over all cores",
        "hardware": "list the hardware that the simulator has, or scale it to another model",
        "profile": "measure a vLLM engine and write a hardware file for the simulator",
        "config": "check a configuration file, or print the whole configuration in force",
        "replay": "feed a decision log to the scheduler again and compare its decisions",
        "completion": "print what makes a shell complete commands and options",
    }
)
"""Every subcommand, in the order of the help, with its one line of help."""

# Distributions that not every command needs: a missing one is a matter of installation, not a bug.
_EXTRA_OF = {
    "aiohttp": "proxy",
    "apscheduler": "batch",
    "rich": "top",
    "shtab": "completion",
    "sqlalchemy": "batch",
    "textual": "top",
    "uvloop": "proxy",
}
_OPTIONAL = frozenset({"psutil", "ray", "torch", "vllm", "zmq", *_EXTRA_OF})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status of the process.

    0 is success, 1 a failure said in one line, 2 a mistake in the arguments, 130 Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(arguments)
        # A reader that has left is noticed here, and not when the interpreter ends.
        sys.stdout.flush()
        return status
    except CommandError as error:
        print(f"llumsched: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        distribution = (error.name or "").partition(".")[0]
        if distribution not in _OPTIONAL:
            raise
        extra = "'cpu', or 'gpu' on a machine with GPUs"
        if distribution in _EXTRA_OF:
            extra = f"'{_EXTRA_OF[distribution]}'"
        print(
            f"llumsched: '{arguments[0]}' needs {distribution}, which is not installed: install"
            f" llumsched with its extra {extra}",
            file=sys.stderr,
        )
        return 1
    except BrokenPipeError:
        # The reader (`| head`) left: what remains in the buffer must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _dispatch(arguments: list[str]) -> int:
    parser = _parser(chosen=None, module=None)
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    name = arguments[0]
    if name not in COMMANDS:
        if name.startswith("-"):
            parser.parse_args(arguments[:1])  # --help, --version and unknown options end here
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        parser.error(f"there is no command '{name}'; {hint}commands: {', '.join(COMMANDS)}")
    module = importlib.import_module(f"llumsched.commands.{name}")
    if getattr(module, "PASSTHROUGH", False):
        status: int = module.main(arguments[1:])
    else:
        status = module.run(_parser(chosen=name, module=module).parse_args(arguments))
    return status


def whole_parser() -> argparse.ArgumentParser:
    """The parser with the arguments of every command, but for those that read vLLM's flags."""
    modules = {name: importlib.import_module(f"llumsched.commands.{name}") for name in COMMANDS}
    return _parser_with({n: m for n, m in modules.items() if not hasattr(m, "PASSTHROUGH")})


def _parser(*, chosen: str | None, module: ModuleType | None) -> argparse.ArgumentParser:
    """The whole parser, in which only ``chosen`` has been asked for its own arguments."""
    return _parser_with({} if chosen is None or module is None else {chosen: module})


def _parser_with(modules: Mapping[str, ModuleType]) -> argparse.ArgumentParser:
    parser = Parser(
        prog="llumsched",
        description=(
            "A global scheduler for LLM serving: many vLLM instances as one pool, with running"
            " requests migrated live between them."
        ),
        epilog="'llumsched COMMAND --help' describes one command.",
    )
    parser.add_argument("--version", action="version", version=f"llumsched {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        if name in modules:
            modules[name].add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser
