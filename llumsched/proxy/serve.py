"""`llumsched serve --backend URL …`: the command line, and the process from start to end."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import aiohttp
import uvloop
from aiohttp import web

from llumsched import __version__, logs
from llumsched.access import API_KEY_VARIABLE, AdminApi, is_loopback, serves_admin_api, warning_of
from llumsched.config import Config, ConfigError, load, loads
from llumsched.flags import Parser, server_url
from llumsched.proxy.app import make_app
from llumsched.proxy.backends import (
    SYNTAX,
    Backend,
    BackendError,
    checked,
    parse_backend,
    read_backends,
)
from llumsched.proxy.fleet import Fleet

logger = logging.getLogger(__name__)

RELOAD_INTERVAL_S = 1.0
CONNECT_TIMEOUT_S = 5.0
SHUTDOWN_TIMEOUT_S = 30.0


def main(argv: Sequence[str]) -> int:
    """Serve until a signal; the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        backends, config, config_file = _plan(arguments)
    except (BackendError, ConfigError) as error:
        parser.error(str(error))
    logs.set_up("llumsched", logs.options_of(argv))
    try:
        uvloop.run(_serve(arguments, backends, config, config_file))
    except OSError as error:
        sys.stderr.write(
            f"llumsched serve: cannot listen at {arguments.host}:{arguments.port}:"
            f" {error.strerror}; name another --port\n"
        )
        return 1
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="llumsched serve",
        description="Serve plain OpenAI servers of any engine behind one endpoint: dispatch by a"
        " policy, retries before the first token, drain and reload. Requests do not move between"
        " such servers; that needs instances of vLLM's that llumsched starts itself.",
    )
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument(
        "--backend", action="append", metavar="URL", help=f"a server; may be repeated: {SYNTAX}"
    )
    group.add_argument(
        "--backends",
        type=Path,
        metavar="FILE",
        help="YAML with a list 'backends' and, beside it, keys of the scheduler's configuration;"
        " the list is read again when the file changes",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="scheduler's configuration")
    parser.add_argument("--policy", metavar="NAME", help="scheduling policy bundle")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument(
        "--api-key",
        nargs="+",
        metavar="KEY",
        help=f"clients need one of these; default: {API_KEY_VARIABLE} of the environment, if it is"
        " set",
    )
    parser.add_argument(
        "--admin-api",
        choices=get_args(AdminApi),
        default="auto",
        help="paths under /llumsched, and headers that name an answer's server; auto: only if"
        " nobody beyond this machine reaches --host",
    )
    parser.add_argument(
        "--batch-url",
        type=server_url,
        metavar="URL",
        help="pass /v1/files and /v1/batches on to 'llumsched batch' there",
    )
    parser.add_argument(
        "--continue-streams",
        action="store_true",
        help="ask another server for the rest of a stream whose server is lost, from the text"
        " delivered; the text may differ from what the lost server would have said",
    )
    parser.add_argument(
        logs.FORMAT_FLAG, choices=logs.FORMATS, default="text", help="default: %(default)s"
    )
    return parser


def _plan(arguments: argparse.Namespace) -> tuple[tuple[Backend, ...], Config, str | None]:
    """Servers and configuration that the arguments ask for, and the file that it is in.

    Raises:
        BackendError, ConfigError: something in them is wrong.
    """
    config = Config() if arguments.config is None else load(arguments.config)
    config_file = arguments.config
    if arguments.backends is not None:
        backends, text = read_backends(arguments.backends)
        if text and arguments.config is not None:
            raise BackendError(
                f"{arguments.backends}: it has keys of the scheduler's configuration, and so has"
                f" --config {arguments.config}; keep them in one of the two"
            )
        if text:
            config, config_file = loads(text, str(arguments.backends)), arguments.backends
    else:
        backends = checked([parse_backend(text) for text in arguments.backend], "--backend")
    if arguments.policy is not None:
        if arguments.config is not None:
            raise BackendError("give --policy or --config, not both")
        config = loads(f"policy: {arguments.policy}", "--policy")
    return backends, config, None if config_file is None else str(config_file)


async def _serve(
    arguments: argparse.Namespace,
    backends: Sequence[Backend],
    config: Config,
    config_file: str | None,
) -> None:
    keys = [key for key in arguments.api_key or [os.environ.get(API_KEY_VARIABLE)] if key]
    is_local = is_loopback(arguments.host)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, auto_decompress=False
    ) as session:
        probes = aiohttp.ClientSession(timeout=timeout)
        fleet = Fleet(config, probes)
        for backend in backends:
            fleet.add(backend)
        app = make_app(
            fleet,
            session,
            api_keys=keys,
            admin_api=serves_admin_api(arguments.admin_api, is_local=is_local),
            config_file=config_file,
            batch_url=arguments.batch_url,
            continues_streams=arguments.continue_streams,
        )
        # A client that leaves ends the work for it.
        runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )
        await runner.setup()
        tasks = []
        if arguments.backends is not None:
            tasks.append(asyncio.create_task(_reload(arguments.backends, fleet)))
        try:
            await web.TCPSite(runner, arguments.host, arguments.port).start()
            address = f"http://{arguments.host}:{arguments.port}"
            warning = warning_of(
                arguments.admin_api, is_local=is_local, has_keys=bool(keys), address=address
            )
            if warning is not None:
                logger.warning("%s", warning)
            logger.info(
                "llumsched %s: %s behind %s; policy %s, no migration",
                __version__,
                logs.counted(len(fleet.servers), "server"),
                address,
                config.policy,
            )
            await _signalled()
            logger.info("ending: open answers have %.0f s", SHUTDOWN_TIMEOUT_S)
        finally:
            for task in tasks:
                task.cancel()
            await runner.cleanup()
            await fleet.close()
            await probes.close()


async def _reload(path: Path, fleet: Fleet) -> None:
    """Take in the file's list whenever it changes; a list that is wrong changes nothing."""
    last = _stamp(path)
    while True:
        await asyncio.sleep(RELOAD_INTERVAL_S)
        stamp = _stamp(path)
        if stamp == last:
            continue
        last = stamp
        try:
            backends, _ = read_backends(path)
        except BackendError as error:
            logger.error("not read again, the servers stay as they are: %s", error)
            continue
        logger.info("%s: %s", path, logs.counted(len(backends), "server"))
        fleet.replace(backends)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


async def _signalled() -> None:
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, event.set)
    await event.wait()
