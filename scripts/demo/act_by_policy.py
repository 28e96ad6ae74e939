"""The third act: one instance is crowded beside an idle one, and the policy evens it out.

The imbalance is made as clients make it: all chats start, dispatch spreads them evenly, and then
those of one instance hang up. No dispatcher can foresee that; only moving running requests helps.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from llumsched.commands.status import instance_table
from llumsched.policies.freeness_pairs import FreenessPairs
from scripts.demo import story
from scripts.demo.client import Answer
from scripts.demo.stage import POLL_INTERVAL_S, Check, DemoFailed, Stage, Watch, until

# Long enough that the policy decides several times before the answers end.
MAX_TOKENS = 192
# One an instance, so that no chat waits for another's prompt and the policy stays quiet meanwhile.
STARTED_TOGETHER = 2
HANG_UP_AT_TOKEN = 2
NUM_MOVES_WANTED = 2
STREAMING_TIMEOUT_S = 120.0
MOVING_TIMEOUT_S = 60.0
SETTLING_TIMEOUT_S = 2.0


@dataclass(slots=True)
class Chats:
    """The chats by number: what their clients have, and the tasks that stream them."""

    answers: dict[int, Answer] = field(default_factory=dict)
    tasks: dict[int, asyncio.Task[Answer]] = field(default_factory=dict)

    def start(self, stage: Stage, number: int, prompt: str) -> None:
        def on_text(answer: Answer, _text: str) -> None:
            self.answers[number] = answer

        chat = stage.client.chat(prompt, max_tokens=MAX_TOKENS, to_the_end=True, on_text=on_text)
        self.tasks[number] = asyncio.create_task(chat)

    def all_stream(self, watch: Watch) -> bool:
        for task in self.tasks.values():
            if task.done():
                task.result()
                raise DemoFailed("a chat ended before all of them had begun")
        return len(self.answers) == len(self.tasks) and all(
            answer.num_tokens >= HANG_UP_AT_TOKEN and answer.request_id in watch.instance_of
            for answer in self.answers.values()
        )

    def all_done(self) -> bool:
        return all(task.done() for task in self.tasks.values())

    def number_of(self, request_id: str) -> int | None:
        """The chat of a request; none for one that has hung up and is not aborted yet."""
        numbers = (n for n, answer in self.answers.items() if answer.request_id == request_id)
        return next(numbers, None)

    def num_moves(self, watch: Watch) -> int:
        return sum(watch.num_moves[answer.request_id] for answer in self.answers.values())

    def hang_up(self, number: int) -> None:
        self.tasks.pop(number).cancel()
        del self.answers[number]


@contextlib.asynccontextmanager
async def _chats() -> AsyncIterator[Chats]:
    """Chats that end with the block, whatever becomes of it."""
    chats = Chats()
    try:
        yield chats
    finally:
        for task in chats.tasks.values():
            task.cancel()
        await asyncio.gather(*chats.tasks.values(), return_exceptions=True)


async def play(stage: Stage) -> list[Check]:
    """Crowd one instance, watch the policy, compare what moved with what did not."""
    screen, thresholds, prompts = stage.screen, FreenessPairs(), story.passages()
    screen.heading("3 · Running answers move by policy")
    screen.paragraph(
        f"{len(prompts)} more chats, and the clients of one instance hang up. Of the policy"
        f" `latency`, unchanged: an instance with freeness below {thresholds.source_below:g} gives"
        f" requests away, one with more than {thresholds.destination_above:g} takes them in."
    )
    num_committed_before = await stage.num_committed()
    hung_up_s: float | None = None

    def after_the_hang_up() -> str:
        waited_s = time.monotonic() - hung_up_s if hung_up_s is not None else 0.0
        return screen.dim(f"+{waited_s:.1f} s")

    def on_move(request_id: str, source: str, destination: str, num_tokens: int) -> None:
        number = chats.number_of(request_id)
        if number is not None:
            screen.line(
                f"{after_the_hang_up()}  {screen.green('── policy:')} chat {number}"
                f" {source} → {destination} after {num_tokens} tokens {screen.green('──')}"
            )

    async with _chats() as chats, stage.watching(on_move) as watch:
        async with screen.waiting("until all chats stream"):
            for number, prompt in enumerate(prompts, start=1):
                chats.start(stage, number, prompt)
                if number % STARTED_TOGETHER == 0:
                    await until(
                        lambda: chats.all_stream(watch),
                        timeout_s=STREAMING_TIMEOUT_S,
                        otherwise="the chats did not all begin to stream",
                    )
        idle = _hang_up(chats, watch)
        hung_up_s = time.monotonic()
        screen.line(
            f"{after_the_hang_up()}  the clients of {' and '.join(sorted(idle))} hang up;"
            f" {len(chats.tasks)} chats go on"
        )
        await _show_load(stage, lambda instance_id, load: instance_id not in idle or load == 0)
        await until(
            lambda: chats.num_moves(watch) >= NUM_MOVES_WANTED or chats.all_done(),
            timeout_s=MOVING_TIMEOUT_S,
        )
        await _show_load(stage, lambda instance_id, load: instance_id not in idle or load > 1)
        async with screen.waiting("until the chats end"):
            done = {number: await task for number, task in chats.tasks.items()}
    num_moves = await stage.num_committed() - num_committed_before
    moved = [n for n, answer in done.items() if watch.num_moves[answer.request_id]]
    async with screen.waiting(f"the {len(moved)} that moved once more, unmigrated, to compare"):
        again = await asyncio.gather(
            *(
                stage.client.chat(prompts[n - 1], max_tokens=MAX_TOKENS, to_the_end=True)
                for n in moved
            )
        )
    num_identical = sum(
        done[n].token_ids == answer.token_ids for n, answer in zip(moved, again, strict=True)
    )
    return [
        Check(
            holds=num_moves >= NUM_MOVES_WANTED and bool(moved),
            text=f"running answers moved {num_moves} times because the policy said so",
        ),
        Check(
            holds=num_identical == len(moved),
            text=f"{num_identical} of {len(moved)} that it moved are identical to unmigrated ones",
        ),
        Check(
            holds=all(answer.is_complete for answer in done.values()),
            text=f"all {len(done)} chats that did not hang up streamed to their end",
        ),
    ]


def _hang_up(chats: Chats, watch: Watch) -> set[str]:
    """End the chats of all instances but the fullest; the instances that are idle now."""
    on = {n: watch.instance_of[answer.request_id] for n, answer in chats.answers.items()}
    running = Counter(on.values())
    crowded = max(running, key=lambda instance_id: (running[instance_id], instance_id))
    for number, instance_id in on.items():
        if instance_id != crowded:
            chats.hang_up(number)
    return set(running) - {crowded}


async def _show_load(stage: Stage, is_expected: Callable[[str, int], bool]) -> None:
    """The load table, once the reports of the instances have caught up."""
    deadline_s = time.monotonic() + SETTLING_TIMEOUT_S
    while True:
        instances = await stage.instances()
        if time.monotonic() > deadline_s or all(
            is_expected(i["instance_id"], i["load"]["num_running"])
            and not i["load"]["num_reserved_blocks"]
            for i in instances
        ):
            break
        await asyncio.sleep(POLL_INTERVAL_S / 2)
    stage.screen.table(instance_table(instances))
