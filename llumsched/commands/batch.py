"""``llumsched batch``: files and batches as OpenAI's API has them, beside an endpoint."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llumsched import logs
from llumsched.access import API_KEY_VARIABLE, is_loopback
from llumsched.commands import CommandError
from llumsched.commands._admin import add_server
from llumsched.flags import server_url

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

logger = logging.getLogger(__name__)


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "batch",
        help="serve files and batches of requests, and do them in idle room of an endpoint",
        description=(
            "Serve OpenAI's /v1/files and /v1/batches, and send the lines of batches to the"
            " endpoint at --url as bulk work. Files and batches are in a database: stopped or"
            " killed, the process goes on where it was when it is started again."
        ),
    )
    add_server(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8100, help="default: %(default)s")
    parser.add_argument(
        "--database",
        default="sqlite:///llumsched.db",
        metavar="URL",
        help="SQLAlchemy's URL of an SQLite file or a PostgreSQL database; default: %(default)s",
    )
    parser.add_argument(
        "--client-key",
        nargs="+",
        default=[],
        metavar="KEY",
        help="clients need one of these, and see the files and batches of their own",
    )
    parser.add_argument(
        "--jobs",
        type=Path,
        metavar="FILE",
        help="YAML with a list 'jobs' of scheduled work: 'llumsched jobs'",
    )
    parser.add_argument(
        "--admin-key",
        nargs="+",
        default=[],
        metavar="KEY",
        help="operators need one of these for jobs, and may then add and remove jobs",
    )
    parser.add_argument(
        "--most-in-flight",
        type=int,
        default=256,
        metavar="N",
        help="lines sent at once at most, however much room there is; default: %(default)s",
    )
    parser.add_argument(
        "--beside",
        type=int,
        default=1,
        metavar="N",
        help="lines at once for each instance while other requests run; default: %(default)s",
    )
    parser.add_argument(
        "--most-failures",
        type=int,
        default=8,
        metavar="N",
        help="a line that has failed so often has failed; default: %(default)s",
    )
    parser.add_argument(
        "--request-timeout",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="for the answer to a line; default: %(default)g",
    )
    parser.add_argument(
        "--lease",
        type=float,
        default=15.0,
        metavar="SECONDS",
        help="after which the lines of a process that is gone are sent again; default: %(default)g",
    )
    parser.add_argument(
        "--most-lines",
        type=int,
        default=1_000_000,
        metavar="N",
        help="lines of a file at most; default: %(default)s",
    )
    parser.add_argument(
        logs.FORMAT_FLAG, choices=logs.FORMATS, default="text", help="default: %(default)s"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    from llumsched.batch.database import DatabaseError
    from llumsched.batch.serve import ServeOptions, serve
    from llumsched.batch.worker import WorkerOptions
    from llumsched.jobs.part import Jobs
    from llumsched.jobs.spec import SpecError, load

    is_local = is_loopback(args.host)
    if not args.client_key and not is_local:
        raise CommandError(f"--host {args.host} is open to others: give --client-key as well")
    try:
        url = server_url(args.url)
    except argparse.ArgumentTypeError as error:
        raise CommandError(f"--url {error}") from None
    try:
        jobs = None if args.jobs is None else load(args.jobs)
    except SpecError as error:
        raise CommandError(str(error)) from error
    logs.set_up("batch", logs.LogOptions(format=args.log_format))
    options = ServeOptions(
        endpoint_url=url,
        endpoint_key=args.api_key or os.environ.get(API_KEY_VARIABLE),
        host=args.host,
        port=args.port,
        database_url=args.database,
        client_keys=args.client_key,
        admin_keys=args.admin_key,
        most_lines=args.most_lines,
        request_timeout_s=args.request_timeout,
        worker=WorkerOptions(
            most_in_flight=args.most_in_flight,
            beside_others=args.beside,
            most_failures=args.most_failures,
            lease_s=args.lease,
        ),
    )
    try:
        # Without a key, jobs are for whoever is on this machine alone.
        if args.admin_key or is_local:
            part = partial(Jobs, jobs=jobs, may_change=bool(args.admin_key))
            asyncio.run(serve(options, [part]))
        elif jobs is not None:
            raise CommandError(f"--jobs with --host {args.host} needs --admin-key as well")
        else:
            logger.warning(
                "%s can be reached from other machines, so jobs are not served: 'llumsched jobs'"
                " does not work. To have them, give --admin-key KEY.",
                args.host,
            )
            asyncio.run(serve(options))
    except DatabaseError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(
            f"cannot listen at {args.host}:{args.port}: {error.strerror}; name another --port"
        ) from error
    return 0
