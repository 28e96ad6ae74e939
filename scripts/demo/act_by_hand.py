"""The second act: one running answer moves because the operator says so.

The same answer is then computed again without a migration, and its context as of the move is
computed from nothing, so that what the move changed and what it saved are measured, not assumed.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from llumsched.commands.migrate import copied
from scripts.demo import story
from scripts.demo.client import Answer, OnText
from scripts.demo.screen import Running, Screen
from scripts.demo.stage import Check, DemoFailed, Stage

MAX_TOKENS = 128
MOVE_AT_TOKEN = 48
# Sampled, so that the state of the random generator has to move as well.
TEMPERATURE = 0.7
SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """One answer, migrated and not. ``report`` is what the server says of the migration;
    ``prefill_s`` what computing its context at the move takes."""

    migrated: Answer
    unmigrated: Answer
    report: dict[str, Any]
    prefill_s: float

    @property
    def num_tokens_before(self) -> int:
        number: int = self.report["num_output_tokens"]
        return number

    @property
    def num_tokens_after(self) -> int:
        return self.migrated.num_tokens - self.num_tokens_before

    @property
    def num_context_tokens(self) -> int:
        return len(self.migrated.prompt_token_ids) + self.num_tokens_before

    @property
    def pause_s(self) -> float:
        """Pause that the client saw: from the last token before the move to the first after it."""
        return self.migrated.gap_s(self.num_tokens_before)

    @property
    def is_identical(self) -> bool:
        return (
            self.migrated.token_ids == self.unmigrated.token_ids
            and self.migrated.text == self.unmigrated.text
        )


async def play(stage: Stage) -> tuple[list[Check], Moved]:
    """Move an answer while it streams, then measure."""
    screen = stage.screen
    screen.heading("2 · A running answer moves by hand")
    screen.paragraph(
        f"A long prompt, a sampled answer (temperature {TEMPERATURE}, seed {SEED}). While it"
        " streams: POST /llumsched/migrations {request_id}, which is `llumsched migrate`."
    )
    num_committed_before = await stage.num_committed()
    migrated, report = await _stream_and_move(stage)
    num_committed = await stage.num_committed() - num_committed_before
    async with screen.waiting("the same answer once more, unmigrated, to compare"):
        unmigrated = await _answer(stage)
    context = migrated.prompt_token_ids + migrated.token_ids[: report["num_output_tokens"]]
    async with screen.waiting("what the move has saved: computing that context again"):
        prefill_s = await stage.client.prefill_s(context)
    moved = Moved(migrated=migrated, unmigrated=unmigrated, report=report, prefill_s=prefill_s)
    is_complete = migrated.is_complete and unmigrated.is_complete
    checks = [
        Check(
            holds=is_complete and num_committed == 1,
            text="one answer moved by hand while it streamed, and once only",
        ),
        Check(
            holds=moved.is_identical,
            text=f"all its {migrated.num_tokens} tokens are those of the unmigrated answer",
        ),
    ]
    return checks, moved


async def _stream_and_move(stage: Stage) -> tuple[Answer, dict[str, Any]]:
    screen = stage.screen
    lines = Running(screen, alone=True)
    moves: list[asyncio.Task[dict[str, Any]]] = []

    def on_text(answer: Answer, text: str) -> None:
        if not lines.label:
            lines.label = watch.instance_of.get(answer.request_id, "")
        lines.feed(text)
        if answer.num_tokens >= MOVE_AT_TOKEN and not moves:
            moves.append(asyncio.create_task(move(answer.request_id)))

    async def move(request_id: str) -> dict[str, Any]:
        report = await asyncio.to_thread(stage.admin.migrate, request_id)
        lines.flush()
        lines.label = report["destination"]
        _show_move(screen, report)
        return report

    try:
        async with stage.watching() as watch:
            answer = await _answer(stage, on_text)
            if not moves:
                raise DemoFailed(f"the answer ended before its token {MOVE_AT_TOKEN}")
            report = await moves[0]
    finally:
        for task in moves:
            task.cancel()
    lines.flush()
    return answer, report


async def _answer(stage: Stage, on_text: OnText | None = None) -> Answer:
    return await stage.client.chat(
        story.LONG_PROMPT,
        max_tokens=MAX_TOKENS,
        temperature=TEMPERATURE,
        seed=SEED,
        to_the_end=True,
        on_text=on_text,
    )


def _show_move(screen: Screen, report: dict[str, Any]) -> None:
    where = f"{report['source']} → {report['destination']}"
    screen.line(screen.green(f"── {where} after {report['num_output_tokens']} tokens ──"))
    screen.line(screen.dim(copied(report)))


def show(screen: Screen, moved: Moved) -> None:
    """Both texts side by side, and the measurements."""
    screen.heading("Measured in this run, for the answer that was moved by hand")
    migrated = moved.migrated
    screen.columns(
        ("unmigrated", f"migrated: {moved.report['source']} ‖ {moved.report['destination']}"),
        moved.unmigrated.text,
        migrated.text,
        len(migrated.text_of(moved.num_tokens_before)),
    )
    screen.line()
    times = moved.prefill_s / moved.pause_s
    screen.facts(
        {
            "text": "identical" if moved.is_identical else "DIFFERENT",
            "tokens before / after the move": f"{moved.num_tokens_before} /"
            f" {moved.num_tokens_after}",
            "pause that the client saw": _ms(moved.pause_s),
            "one ordinary decode step": f"{_ms(migrated.step_s())} (median)",
            f"re-computing its {moved.num_context_tokens} tokens": f"{_ms(moved.prefill_s)},"
            f" {times:.0f} times the pause",
        }
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms"
