"""``python -m scripts.demo``: prepare the model, start the server, three acts, a measurement."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from llumsched.commands._admin import AdminClient
from llumsched.flags import Parser
from scripts.demo import act_by_hand, act_by_policy, act_chats
from scripts.demo.client import Client
from scripts.demo.running import machine, quiet, run
from scripts.demo.screen import Screen
from scripts.demo.server import Server
from scripts.demo.stage import Check, Stage
from scripts.prepare_model import ALIAS, default_cache_dir, prepare_model

TIMEOUT_S = 900.0

# A KV cache so small that four chats are a load: 52 blocks of 32 tokens an instance (vLLM keeps
# one of the 53 to itself). In float32 a batch computes what a request alone does, so that the
# texts of busy instances can be compared.
FLAGS = (
    "--instances 2",
    "--policy latency",
    "--dtype float32",
    "--enforce-eager",
    "--block-size 32",
    "--num-gpu-blocks-override 53",
    "--max-model-len 1664",
    "--disable-uvicorn-access-log",
)

NEXT = (
    "Next: `make serve` keeps two instances up on port 8000, and `.venv/bin/llumsched status` shows"
    " them. Your own model, flags and policies: docs/quick-start.md and docs/serving.md."
)


def main() -> int:
    """Run the demo."""
    parser = Parser(
        prog="python -m scripts.demo",
        description="Two vLLM instances, streamed chats, and live migrations, shown and measured.",
    )
    parser.add_argument(
        "--model", default=ALIAS, help=f"'{ALIAS}' (default), a hub name or a model folder"
    )
    arguments = parser.parse_args()
    screen = Screen()
    screen.title("llumsched: many vLLM instances as one pool; running requests migrate live")
    screen.paragraph(machine())
    try:
        model = prepare_model(arguments.model)
    except RuntimeError as error:
        screen.check(False, str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    server = Server(_short(model), FLAGS, default_cache_dir() / "demo-server.log")
    try:
        return asyncio.run(run(screen, server, _act, closing=NEXT, timeout_s=TIMEOUT_S))
    finally:
        server.close()


async def _act(screen: Screen, url: str) -> list[Check]:
    async with Client(url) as client:
        stage = Stage(screen=screen, client=client, admin=AdminClient(url))
        checks = await act_chats.play(stage)
        by_hand, moved = await act_by_hand.play(stage)
        checks += by_hand
        checks += await act_by_policy.play(stage)
        checks += await quiet(stage)
    act_by_hand.show(screen, moved)
    screen.line()
    for check in checks:
        screen.check(check.holds, check.text)
    return checks


def _short(model: str) -> str:
    """A folder below the current one by its relative path: the command is there to be read."""
    path = Path(model)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return model


if __name__ == "__main__":
    sys.exit(main())
