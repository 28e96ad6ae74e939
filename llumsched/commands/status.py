"""``llumsched status``: the instances of a running server, their load and their requests.

The tables are made by plain functions of what the admin API answers; the demo prints them too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llumsched.commands import CommandError
from llumsched.commands._admin import AdminClient, add_server
from llumsched.commands._totals import ProcessSample, failures, look, rates, totals
from llumsched.places import place_lines

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

INSTANCE_COLUMNS = (
    "instance",
    "state",
    "freeness",
    "blocks",
    "KV",
    "reserved",
    "running",
    "waiting",
    "step",
    "report",
)
REQUEST_COLUMNS = ("request", "instance", "tokens", "moves")
UNKNOWN = "-"
DEFAULT_INTERVAL_S = 2.0
LEAST_INTERVAL_S, MOST_INTERVAL_S = 0.1, 3600.0
# To a terminal: clear it, and write from its top.
CLEAR = "\x1b[2J\x1b[H"


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "status",
        help="show the instances of a running server, their load and their requests",
        description=(
            "Show the instances of a running server and its unfinished requests. Freeness is how"
            " many more KV blocks there are for each running request; blocks are those in use, of"
            " all, and KV their share; step is the recent time of one decode step; report is the"
            " load report's age. Requests held by the scheduler wait for room at any instance."
        ),
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=_seconds,
        const=DEFAULT_INTERVAL_S,
        metavar="SECONDS",
        help="show it again and again, with rates of requests and tokens; every"
        f" {DEFAULT_INTERVAL_S:g} seconds without a number. Ctrl-C ends it",
    )
    add_server(parser)
    parser.add_argument("--json", action="store_true", help="print what the admin API answers")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the two tables, once or until Ctrl-C."""
    client = AdminClient.of(args)
    if args.watch is None:
        cluster, requests = client.instances(), client.requests()
        if args.json:
            print(json.dumps({**cluster, "requests": requests}, indent=2))
        else:
            print("\n".join(page(cluster, requests)))
        return 0
    if args.json:
        raise CommandError("give --watch or --json, not both")
    return _watch(client, args.watch)


def _watch(client: AdminClient, interval_s: float) -> int:
    before: ProcessSample | None = None
    while True:
        try:
            cluster, requests = client.instances(), client.requests()
            now = look(cluster, requests, time.monotonic())
            lines = page(cluster, requests, rates(before, now))
            before = now
        except CommandError as error:
            # A server that is started again is worth waiting for.
            before, lines = None, [str(error)]
        if sys.stdout.isatty():
            print(CLEAR, end="")
        print(time.strftime("%H:%M:%S"), *lines, "", sep="\n", flush=True)
        time.sleep(interval_s)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not LEAST_INTERVAL_S <= seconds <= MOST_INTERVAL_S:
        raise argparse.ArgumentTypeError(
            f"a number of seconds from {LEAST_INTERVAL_S} to {MOST_INTERVAL_S:g} is needed"
        )
    return seconds


def page(
    cluster: Mapping[str, Any], requests: Sequence[Mapping[str, Any]], rates_in_words: str = ""
) -> list[str]:
    """All that is shown, as lines."""
    said = [summary(cluster), totals(cluster, rates_in_words), failures(cluster)]
    return [
        *(line for line in said if line),
        "",
        *instance_table(cluster["instances"]),
        *migration_lines(cluster["instances"]),
        *place_lines(cluster["berths"]),
        *frontend_lines(cluster["frontends"]),
        "",
        *(request_table(requests) if requests else ["no unfinished request"]),
    ]


def summary(cluster: Mapping[str, Any]) -> str:
    """The policy and what became of the migrations so far, in one line."""
    outcomes = ", ".join(f"{n} {outcome}" for outcome, n in sorted(cluster["migrations"].items()))
    source = f" as {cluster['config_file']} has it" if cluster.get("config_file") else ""
    return f"policy {cluster['policy']}{source}; migrations: {outcomes or 'none yet'}"


def instance_table(instances: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table with one row an instance."""
    if not instances:
        return ["no instance serves"]
    return _table(INSTANCE_COLUMNS, [_instance_row(instance) for instance in instances], text=2)


def migration_lines(instances: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why requests cannot move, one line an instance that they can neither leave nor reach."""
    return [
        f"{instance['instance_id']}: no request can leave or reach it: {instance['cannot_migrate']}"
        for instance in instances
        if instance["cannot_migrate"]
    ]


def frontend_lines(frontends: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines on places where frontends boot, or have died."""
    lines = []
    for frontend in frontends:
        parts = []
        if frontend["state"] != "serving":
            parts.append(frontend["state"])
        if frontend["num_deaths"]:
            died = f"{frontend['num_deaths']} died in this place ({frontend['last_failure']})"
            parts.append(died)
        if parts:
            lines.append(f"{frontend['frontend_id']}: {'; '.join(parts)}")
    return lines


def request_table(requests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table with one row an unfinished request, by instance."""
    ordered = sorted(requests, key=lambda r: (r["instance_id"] or "", r["request_id"]))
    rows = [
        (
            str(request["request_id"]),
            str(request["instance_id"] or "not placed yet"),
            str(request["num_output_tokens"]),
            str(request["num_moves"]),
        )
        for request in ordered
    ]
    return _table(REQUEST_COLUMNS, rows, text=2)


def _instance_row(instance: Mapping[str, Any]) -> tuple[str, ...]:
    load, age_s = instance["load"], instance["report_age_s"]
    head = (str(instance["instance_id"]), str(instance["state"]))
    if load is None:
        return head + (UNKNOWN,) * (len(INSTANCE_COLUMNS) - len(head))
    free, reserved = load["num_free_blocks"], load["num_reserved_blocks"]
    used = load["num_total_blocks"] - free - reserved
    return (
        *head,
        _freeness(instance),
        f"{used}/{load['num_total_blocks']}",
        f"{used / load['num_total_blocks']:.0%}" if load["num_total_blocks"] else UNKNOWN,
        str(reserved),
        str(load["num_running"]),
        str(load["num_waiting"]),
        f"{1000 * load['step_time_s']:.0f} ms" if load["step_time_s"] else UNKNOWN,
        f"{age_s:.1f} s" if age_s is not None else UNKNOWN,
    )


def _freeness(instance: Mapping[str, Any]) -> str:
    """JSON has no infinity, so the server says null for it: which one, the state tells."""
    if instance["freeness"] is not None:
        return f"{instance['freeness']:.1f}"
    return "-inf" if instance["state"] == "draining" else "inf"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: int) -> list[str]:
    """Aligned columns: the first ``text`` to the left, the others, which are numbers, right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if column < text else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
