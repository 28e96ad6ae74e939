"""The first act: a handful of chats at once, printed as they come, and the load while they ran."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from llumsched.commands.status import instance_table
from scripts.demo import story
from scripts.demo.client import Answer
from scripts.demo.screen import Running
from scripts.demo.stage import Check, Stage, beside, until

MAX_TOKENS = 80
TABLE_AT_TOKEN = 4
TABLE_TIMEOUT_S = 60.0


async def play(stage: Stage) -> list[Check]:
    """Stream the chats."""
    screen = stage.screen
    screen.heading("1 · Several chats at once, through one OpenAI endpoint")
    answers: dict[int, Answer] = {}
    running = {number: Running(screen) for number in range(1, len(story.CHATS) + 1)}
    table: list[str] = []

    def show(number: int) -> Callable[[Answer, str], None]:
        def on_text(answer: Answer, text: str) -> None:
            answers[number] = answer
            instance_id = watch.instance_of.get(answer.request_id)
            if instance_id is not None:
                running[number].label = f"chat {number} on {instance_id}"
            running[number].feed(text)

        return on_text

    def all_stream() -> bool:
        return len(answers) == len(running) and all(
            answer.num_tokens >= TABLE_AT_TOKEN for answer in answers.values()
        )

    async def look() -> None:
        await until(all_stream, timeout_s=TABLE_TIMEOUT_S)
        table.extend(instance_table(await stage.instances()))

    async with stage.watching() as watch, beside(look()):
        done = await asyncio.gather(
            *(
                stage.client.chat(prompt, max_tokens=MAX_TOKENS, on_text=show(number))
                for number, prompt in enumerate(story.CHATS, start=1)
            )
        )
    for lines in running.values():
        lines.flush()
    if table:
        screen.line()
        screen.paragraph("The load while they ran, as `llumsched status` shows it:")
        screen.table(table)
    used = {watch.instance_of.get(answer.request_id) for answer in done} - {None}
    is_complete = all(answer.is_complete for answer in done)
    return [
        Check(
            holds=is_complete and len(used) > 1,
            text=f"{len(done)} chats streamed to their end, on {len(used)} instances",
        )
    ]
