"""Write the parts of ``docs/`` that come from the code: protocol, policies, simulator.

A page is prose with generated parts, each between ``<!-- generated: NAME -->`` and
``<!-- end of NAME -->``. Only what lies between is written, so that prose and code each have one
source. ``--check`` writes nothing and fails when a page is behind the code.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from llumsched import plugins
from llumsched.cli import whole_parser
from llumsched.commands._scenario import options_of
from llumsched.core.migration.destination import rules as migration_destination_rules
from llumsched.core.migration.source import rules as migration_rules
from llumsched.core.migration.source.record import MigrationOptions
from llumsched.core.migration.table import Rule, TransitionTable
from llumsched.core.options import SchedulerOptions
from llumsched.core.params import params_of
from llumsched.core.policy import MigrationPair, Placement
from llumsched.core.request_columns import RequestColumns
from llumsched.core.snapshot import InstanceView
from llumsched.core.transfer_options import TransferOptions
from llumsched.core.types import SchedulingRequest
from llumsched.flags import Parser
from llumsched.metrics import CATALOGUE
from llumsched.simulator.hardware.spec import available, load_hardware
from llumsched.simulator.scenario import Scenario
from llumsched.simulator.traces.generators import GENERATORS
from llumsched.simulator.traces.loaders import FORMATS
from scripts import architecture
from scripts.pages import table

DOCS = Path(__file__).parents[1] / "docs"

# What every table of the protocol is to this module: only names are read.
AnyTable = TransitionTable[Any, Any, Any, Any]
AnyRule = Rule[Any, Any, Any]


def diagram(protocol: AnyTable) -> str:
    """The states as a mermaid diagram: an edge a pair of states, labelled with the events."""
    edges: dict[tuple[StrEnum, StrEnum], list[str]] = {}
    for (state, event), rules in protocol.rules.items():
        for rule in rules:
            if rule.to is not state:
                label = f"{event.__name__}{_guard(rule)}"
                edges.setdefault((state, rule.to), []).append(label)
    initial = next(iter(protocol.states.__members__))
    lines = ["stateDiagram-v2", f"    [*] --> {initial}"]
    lines += [
        f"    {state} --> {to}: {'<br/>'.join(dict.fromkeys(labels))}"
        for (state, to), labels in edges.items()
    ]
    return "```mermaid\n" + "\n".join(lines) + "\n```"


def transitions(protocol: AnyTable) -> str:
    """Every (state, event) that does something, rule by rule, and the ones that are ignored."""
    rows = [
        (
            str(state),
            f"{event.__name__}{_guard(rule)}",
            str(rule.to),
            ", ".join(_words(command) for command in rule.do),
        )
        for state, event in protocol
        for rule in protocol.rules.get((state, event), ())
    ]
    ignored: dict[str, list[str]] = {}
    for state, event in protocol:
        if (state, event) in protocol.ignored:
            ignored.setdefault(str(state), []).append(event.__name__)
    return "\n\n".join(
        [
            table(("in", "event [condition]", "to", "commands"), rows),
            "Late or doubled, and ignored:",
            table(("in", "events"), [(state, ", ".join(e)) for state, e in ignored.items()]),
            "Any other pair is a defect in the host, and raises.",
        ]
    )


def policies() -> str:
    """Every policy that ships: what it is, and its parameters with their defaults."""
    parts = []
    kind = ""
    for policy in plugins.installed():
        if policy.source != "llumsched":
            continue
        if policy.kind != kind:
            kind = policy.kind
            parts.append(f"## {kind.capitalize()}")
        parts += [f"### `{policy.name}`", policy.doc]
        rows = [
            (f"`{p.name}`", f"`{p.default}`", p.spec.range_text(), p.spec.doc)
            for p in policy.params
        ]
        if rows:
            parts.append(table(("parameter", "default", "range", ""), rows))
    return "\n\n".join(parts)


def policy_values() -> str:
    """Inputs and answers of a policy, a table a class."""
    tables = []
    for cls in (SchedulingRequest, InstanceView, RequestColumns, Placement, MigrationPair):
        rows = [(f"`{name}`", f"`{kind}`", doc) for name, kind, doc in _fields(cls)]
        tables.append(f"`{cls.__name__}`:\n\n" + table(("field", "type", ""), rows))
    return "\n\n".join(tables)


def _fields(cls: type) -> Iterable[tuple[str, str, str]]:
    """Name, type and documentation of each public field, property and method, from the source."""
    (defined,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(defined, ast.ClassDef)
    for node, after in zip(defined.body, [*defined.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            is_property = any(isinstance(d, ast.Name) for d in node.decorator_list)
            arguments = ", ".join(arg.arg for arg in node.args.args[1:])
            doc = ast.get_docstring(node)
            assert doc is not None, f"{cls.__name__}.{node.name} says nothing"
            if is_property or cls is InstanceView:
                name = node.name if is_property else f"{node.name}({arguments})"
                yield name, ast.unparse(node.returns or ast.Constant(None)), _line(doc)
        elif isinstance(node, ast.AnnAssign) and cls is not InstanceView:
            match after:
                case ast.Expr(value=ast.Constant(value=str(doc))):
                    yield ast.unparse(node.target), ast.unparse(node.annotation), _line(doc)
                case _:
                    raise AssertionError(f"{cls.__name__}: {ast.unparse(node)} says nothing")


def _line(doc: str) -> str:
    return " ".join(doc.split())


def simulate_options() -> str:
    """The options that a scenario has."""
    rows = [
        (
            ", ".join(f"`{option}`" for option in options_of(param.name)),
            "" if param.default is None or param.type is bool else f"`{param.default}`",
            param.spec.range_text(),
            param.spec.doc,
        )
        for param in params_of(Scenario)
        if param.name != "traffic"
    ]
    return table(("option", "default", "range", ""), rows)


def trace_formats() -> str:
    """The formats that traces are read in."""
    return table(("format", ""), [(f"`{f.name}`", f.summary) for f in FORMATS.values()])


def generators() -> str:
    """The generators of traffic."""
    return table(("generator", ""), [(f"`{g.name}`", g.summary) for g in GENERATORS.values()])


def hardware() -> str:
    """The hardware files that ship."""
    rows = []
    for name in available():
        loaded = load_hardware(name)
        rows.append(
            (
                f"`{name}`",
                loaded.model,
                loaded.accelerator,
                f"{loaded.kv.num_blocks:,} of {loaded.kv.block_size} tokens",
                f"{100 * loaded.fit_error:.1f} %",
            )
        )
    return table(("name", "model", "accelerator", "KV blocks", "fit"), rows)


def metrics() -> str:
    """Every metric that is added to vLLM's."""
    rows = [
        (
            f"`{spec.exposed_name}`",
            spec.kind,
            ", ".join(f"`{label}`" for label in spec.labels),
            spec.where.value,
            spec.help,
        )
        for spec in CATALOGUE
    ]
    return table(("metric", "type", "labels", "counted by", ""), rows)


def commands() -> str:
    """Every command and its options, but for those that read vLLM's flags."""
    (subparsers,) = (
        action
        for action in whole_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    parts = []
    for name, parser in subparsers.choices.items():
        if parser.description is None:
            continue
        parts += [f"### `llumsched {name}`", _line(parser.description)]
        rows = [
            (f"`{_names(action)}`", _line(_help(parser, action)))
            for action in parser._actions
            if not isinstance(action, argparse._HelpAction)
        ]
        if rows:
            parts.append(table(("argument", ""), rows))
    return "\n\n".join(parts)


def _names(action: argparse.Action) -> str:
    if not action.option_strings:
        choices = "\\|".join(map(str, action.choices)) if action.choices else ""
        return str(action.metavar or choices or action.dest).replace("\\", "")
    metavar = "" if action.nargs == 0 else action.metavar or action.dest.upper()
    if action.choices and action.metavar is None and action.nargs != 0:
        metavar = "{" + ",".join(map(str, action.choices)) + "}"
    if isinstance(metavar, tuple):
        metavar = " ".join(metavar)
    return f"{', '.join(action.option_strings)} {metavar}".strip()


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    if not action.help or action.help == argparse.SUPPRESS:
        return ""
    return parser._get_formatter()._expand_help(action)


def configuration() -> str:
    """Every key of a configuration file that no policy owns."""
    parts = []
    for section, options in (
        ("scheduler", SchedulerOptions),
        ("migration", MigrationOptions),
        ("transfer", TransferOptions),
    ):
        rows = [
            (f"`{p.name}`", f"`{p.default}`", p.spec.range_text(), p.spec.doc)
            for p in params_of(options)
        ]
        parts += [f"### `{section}`", table(("key", "default", "range", ""), rows)]
    return "\n\n".join(parts)


PARTS: Mapping[str, Callable[[], str]] = {
    "source diagram": lambda: diagram(migration_rules.TABLE),
    "source transitions": lambda: transitions(migration_rules.TABLE),
    "destination diagram": lambda: diagram(migration_destination_rules.TABLE),
    "destination transitions": lambda: transitions(migration_destination_rules.TABLE),
    "policies": policies,
    "policy values": policy_values,
    "simulate options": simulate_options,
    "trace formats": trace_formats,
    "generators": generators,
    "hardware": hardware,
    "messages": architecture.messages,
    "threads and sockets": architecture.threads_and_sockets,
    "metrics": metrics,
    "commands": commands,
    "configuration": configuration,
}
"""Name of a generated part -> what writes it."""


def regenerate(text: str) -> str:
    """A page with its generated parts written again.

    Raises ``KeyError`` for a part that nothing here generates.
    """

    def write(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- generated: {name} -->\n{PARTS[name]()}\n<!-- end of {name} -->"

    pattern = r"<!-- generated: (?P<name>[\w ]+) -->\n.*?<!-- end of (?P=name) -->"
    return re.sub(pattern, write, text, flags=re.DOTALL)


def stale_pages(docs: Path) -> dict[Path, str]:
    """Each page that is behind the code, with its text as it should be."""
    pages = {page: page.read_text(encoding="utf-8") for page in sorted(docs.rglob("*.md"))}
    return {page: new for page, old in pages.items() if (new := regenerate(old)) != old}


def _guard(rule: AnyRule) -> str:
    return f" [{_words(rule.when)}]" if rule.when is not None else ""


def _words(function: Callable[..., object]) -> str:
    return function.__name__.replace("_", " ")


def main() -> int:
    """Write the pages that are behind, or with ``--check`` name them and fail."""
    parser = Parser(description="Write the parts of docs/ that come from code.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one is behind")
    arguments = parser.parse_args()
    stale = stale_pages(DOCS)
    for page, text in stale.items():
        if not arguments.check:
            page.write_text(text, encoding="utf-8")
        print(f"{'behind the code' if arguments.check else 'written'}: {page}")
    if arguments.check and stale:
        print("`make docs` writes them again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
