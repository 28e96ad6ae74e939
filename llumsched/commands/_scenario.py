"""The options of a scenario on the command line, for ``simulate`` and ``sweep``.

They are made from the fields of ``Scenario``: name, type, default and help have one source.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

from llumsched.commands import CommandError
from llumsched.config import ConfigError
from llumsched.core.params import Param, ParamError, params_of
from llumsched.plugins import PluginError
from llumsched.simulator.hardware.spec import HardwareError
from llumsched.simulator.options import SimulationError
from llumsched.simulator.results.export import ExportError
from llumsched.simulator.results.metrics import Slo
from llumsched.simulator.scenario import EXAMPLE, Scenario
from llumsched.simulator.simulation import ExtrapolationWarning
from llumsched.simulator.traces.generators import GENERATORS
from llumsched.simulator.traces.trace import TraceError

FIELDS: Mapping[str, Param] = {
    described.name: described for described in params_of(Scenario) if described.name != "traffic"
}
"""Parts of a scenario besides its traffic."""


SHORT: Mapping[str, str] = {"rate_rps": "rate"}
"""Options with a shorter name besides their own."""

_METAVARS: Mapping[Callable[[str], Any], str] = {str: "NAME", int: "N", float: "X"}


def add_scenario(parser: argparse.ArgumentParser, *, without: frozenset[str] = frozenset()) -> None:
    """The traffic, and an option for each other field of a scenario, absent where not given."""
    parser.add_argument(
        "traffic",
        metavar="TRAFFIC",
        help=(
            "a trace file (CSV or JSON, also gzipped), a generator"
            f" ({', '.join(GENERATORS)}), or '{EXAMPLE}'"
        ),
    )
    group = parser.add_argument_group("traffic, cluster and policy")
    for described in FIELDS.values():
        if described.name in without:
            continue
        options = options_of(described.name)
        if described.type is bool:
            group.add_argument(
                *options,
                action="store_true",
                default=argparse.SUPPRESS,
                help=described.spec.doc,
            )
            continue
        default = "" if described.default is None else f" (default: {described.default})"
        group.add_argument(
            *options,
            dest=described.name,
            type=type_of(described),
            default=argparse.SUPPRESS,
            choices=described.spec.choices,
            metavar=None if described.spec.choices else _METAVARS[type_of(described)],
            help=(described.spec.doc + default).replace("%", "%%"),
        )


def options_of(name: str) -> list[str]:
    """The options that set a field, the shorter one first."""
    return [f"--{spelling.replace('_', '-')}" for spelling in (SHORT.get(name), name) if spelling]


def add_slo(parser: argparse.ArgumentParser) -> None:
    """The bounds of goodput."""
    group = parser.add_argument_group("goodput", "requests that keep every bound that is given")
    for name, what in (("ttft", "to the first token"), ("tpot", "a token after it"),
                       ("e2e", "to the last token")):  # fmt: skip
        group.add_argument(f"--slo-{name}-s", type=float, metavar="S", help=f"seconds {what}")


def slo_of(args: argparse.Namespace) -> Slo:
    """The bounds that were given."""
    return Slo(ttft_s=args.slo_ttft_s, tpot_s=args.slo_tpot_s, e2e_s=args.slo_e2e_s)


def add_price(parser: argparse.ArgumentParser) -> None:
    """Add the price of an instance."""
    parser.add_argument(
        "--hour-price",
        type=float,
        metavar="P",
        help="price of an instance's hour in any currency, for the cost of a million output tokens",
    )


def scenario_of(args: argparse.Namespace) -> Scenario:
    """The scenario that the options describe."""
    given = {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
    return Scenario(traffic=args.traffic, **given)


def type_of(described: Param) -> Callable[[str], Any]:
    """The type of a field, without its None."""
    types = [kind for kind in get_args(described.type) if kind is not type(None)]
    chosen: Callable[[str], Any] = types[0] if types else described.type
    return chosen


@contextmanager
def said_in_one_line() -> Iterator[None]:
    """Whatever the user can mend becomes the one line that the command line prints.

    Extrapolation is not warned about on the way: results carry it, and it is printed with them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExtrapolationWarning)
            yield
    except (
        ConfigError,
        ExportError,
        HardwareError,
        ParamError,
        PluginError,
        SimulationError,
        TraceError,
    ) as error:
        raise CommandError(str(error)) from error
    except BrokenPipeError:
        raise  # the reader of our output has left, which the command line knows
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise CommandError(f"{where}{error.strerror or error}") from error
