"""``llumsched replay``: feed a decision log to the scheduler again and compare its decisions."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import inspect
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from llumsched.commands import CommandError
from llumsched.config import Config, ConfigError, load
from llumsched.core.actions import Action
from llumsched.core.params import ParamError
from llumsched.decision_log import Decision, DecisionLogError
from llumsched.plugins import PluginError
from llumsched.policy_failures import PolicyFailures
from llumsched.replay import Difference, ReplayResult, replay

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "replay",
        help="feed a decision log to the scheduler again and compare its decisions",
        description=(
            "Without --policy or --config every decision must come out as recorded; the exit"
            " status is 1 if one does not. With one of them, the log's events go to another policy,"
            " and the report says what it would have decided and where the two part. The events"
            " stay the recorded ones: what another choice would have led to, a replay cannot know."
            " A folder of results with several logs in it is replayed a log after the other."
        ),
    )
    parser.add_argument(
        "log", type=Path, metavar="LOG", help="a segment, a folder of them, or a folder of logs"
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--policy", metavar="NAME", help="a bundle or dispatch policy to compare")
    other.add_argument("--config", type=Path, metavar="FILE", help="a configuration to compare")
    parser.add_argument(
        "--show", type=int, default=3, metavar="N", help="differences to print (default: 3)"
    )
    parser.add_argument(
        "--decisions", action="store_true", help="print every decision: when, what, and why"
    )
    parser.add_argument(
        "--request", metavar="ID", help="print the decisions about one request, from its arrival on"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Print how recorded and replayed decisions compare."""
    try:
        other = None
        if args.policy is not None:
            other = Config.default(args.policy)
        elif args.config is not None:
            other = load(args.config)
        logs = _logs(args.log)
        status = 0
        for log in logs:
            if len(logs) > 1:
                print(f"{chr(10) if log is not logs[0] else ''}{log.name}")
            status |= _replay(log, other, args)
        return status
    except (ConfigError, DecisionLogError, PluginError, ParamError, OSError) as error:
        raise CommandError(str(error)) from error


def _logs(path: Path) -> list[Path]:
    """The log that was named, or those of the runs in a folder of results."""
    if path.is_dir() and not any(path.glob("*.jsonl")):
        logs = sorted(folder for folder in path.glob("decisions-*") if folder.is_dir())
        if logs:
            return logs
    return [path]


def _replay(log: Path, other: Config | None, args: argparse.Namespace) -> int:
    printer = _Printer(args.request) if args.decisions or args.request else None
    result = replay(log, other, max_shown=args.show, watch=printer)
    if printer is not None and args.request and not printer.num_printed:
        raise CommandError(f"{log}: no decision is about a request {args.request!r}")
    for what, failures in (
        ("recorded", result.recorded_failures),
        ("replayed", result.replayed_failures if other is not None else PolicyFailures()),
    ):
        for failure in failures:
            print(
                f"{failure.count:,} {what} decisions were the scheduler's own: {failure.sentence()}"
            )
    if other is None:
        print(_identity(result))
        for difference in result.first_differences:
            print(_difference(difference))
        return 0 if result.is_identical else 1
    print(_comparison(result, args.policy or str(args.config)))
    for difference in result.first_differences:
        print(_difference(difference))
    return 0


class _Printer:
    """Prints recorded decisions a line an action, all or those about one request."""

    def __init__(self, request_id: str | None) -> None:
        self._request_id = request_id
        self.num_printed = 0

    def __call__(self, decision: Decision, _replayed: tuple[Action, ...]) -> None:
        event = decision.event
        if self._request_id is not None and self._is_about(event):
            self._print(decision, "event", event)
        for action in decision.actions:
            if self._request_id is None or self._is_about(action):
                self._print(decision, "action", action)

    def _is_about(self, value: Any) -> bool:
        request = getattr(value, "request", None)
        named = getattr(request, "request_id", None) or getattr(value, "request_id", None)
        return bool(named == self._request_id)

    def _print(self, decision: Decision, kind: str, value: Any) -> None:
        self.num_printed += 1
        print(f"{_when(decision):>14}  {kind:6}  {_brief(value)}")


def _when(decision: Decision) -> str:
    """Local time of a decision, as logs have it; in a simulation, seconds since it began."""
    if decision.unix_s is None:
        return f"{decision.now:.3f} s"
    moment = datetime.datetime.fromtimestamp(decision.unix_s)
    return moment.isoformat(sep=" ", timespec="milliseconds")


def _identity(result: ReplayResult) -> str:
    if result.is_identical:
        return f"{result.num_events} events replayed: every decision identical"
    return f"{result.num_events} events replayed: {result.num_different} decided differently"


def _comparison(result: ReplayResult, name: str) -> str:
    summary = (
        f"{result.num_events} events; {name} decides {result.num_different} of them otherwise"
        f" and places {result.num_placed_elsewhere} requests elsewhere"
    )
    lines = [
        summary,
        "",
        *_columns("actions", result.recorded, result.replayed),
        "",
        *_columns("dispatches to", result.recorded_on, result.replayed_on),
    ]
    return "\n".join(lines)


def _columns(title: str, recorded: Counter[str], replayed: Counter[str]) -> Iterable[str]:
    names = sorted(recorded.keys() | replayed.keys())
    width = max(len(name) for name in (title, *names))
    yield f"{title:<{width}}  recorded  replayed"
    for name in names:
        yield f"{name:<{width}}  {recorded[name]:>8}  {replayed[name]:>8}"


def _difference(difference: Difference) -> str:
    decision = difference.decision
    return (
        f"\nevent {difference.number}, at {_when(decision)}: {_brief(decision.event)}\n"
        f"  recorded: {_actions(decision.actions)}\n"
        f"  replayed: {_actions(difference.replayed)}"
    )


def _actions(actions: tuple[Action, ...]) -> str:
    return "; ".join(_brief(action) for action in actions) or "nothing"


def _brief(value: Any) -> str:
    """A value without the fields that are at their defaults."""
    if not (dataclasses.is_dataclass(value) or isinstance(value, msgspec.Struct)):
        return repr(value)
    shown = [
        f"{name}={_brief(getattr(value, name))}"
        for name, parameter in inspect.signature(type(value)).parameters.items()
        if getattr(value, name) != parameter.default
    ]
    return f"{type(value).__name__}({', '.join(shown)})"
