"""The demo's terminal: a few kinds of lines, in colour where there is a terminal to colour.

Invariant: what is printed reads the same in a pipe as on a terminal, but for colour and for the one
line that is rewritten while something is waited for. Knows nothing of servers and requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TextIO

MAX_WIDTH = 96
INDENT = "  "
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
SPINNER_INTERVAL_S = 0.12
# Without a terminal to rewrite, a sign of life every so often.
HEARTBEAT_S = 15.0

HAND_OVER = "‖"
# The two columns of text, and what stands between them.
GUTTER = " │ "


class Screen:
    """Prints to ``stream``; ``NO_COLOR`` is respected."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream
        self.is_terminal = stream.isatty()
        self._colours = self.is_terminal and not os.environ.get("NO_COLOR")
        columns = shutil.get_terminal_size((MAX_WIDTH, 24)).columns if self.is_terminal else 0
        self.width = min(columns or MAX_WIDTH, MAX_WIDTH)
        self._started_s = time.monotonic()

    # ---- colours --------------------------------------------------------------------------

    def bold(self, text: str) -> str:
        return self._sgr("1", text)

    def dim(self, text: str) -> str:
        return self._sgr("2", text)

    def green(self, text: str) -> str:
        return self._sgr("32", text)

    def red(self, text: str) -> str:
        return self._sgr("31", text)

    def cyan(self, text: str) -> str:
        return self._sgr("36", text)

    def _sgr(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colours and text else text

    # ---- lines ----------------------------------------------------------------------------

    def line(self, text: str = "") -> None:
        self.rewrite("")
        print((INDENT + text).rstrip(), file=self._stream, flush=True)

    def title(self, text: str) -> None:
        self.rewrite("")
        print(self.bold(text), file=self._stream, flush=True)

    def heading(self, text: str) -> None:
        self.line()
        self.title(text)

    def paragraph(self, text: str) -> None:
        """Text of our own, wrapped."""
        for line in textwrap.wrap(text, self.width - len(INDENT)):
            self.line(self.dim(line))

    def step(self, text: str) -> None:
        """Something that is done, and when."""
        elapsed = f"{time.monotonic() - self._started_s:5.1f} s"
        self.line(f"{self.dim(elapsed)}  {text}")

    def check(self, holds: bool, text: str) -> None:
        self.line(f"{self.green('✓') if holds else self.red('✗')} {text}")

    def table(self, lines: Sequence[str]) -> None:
        """A table whose first line is its header."""
        for number, line in enumerate(lines):
            self.line(self.dim(line) if number == 0 else line)

    def facts(self, facts: Mapping[str, str]) -> None:
        """Names and values in two columns."""
        width = max(map(len, facts)) + 3
        for name, value in facts.items():
            self.line(f"{name.ljust(width)}{self.bold(value)}")

    def command(self, parts: Sequence[str]) -> None:
        """A command to copy, on as many lines as it needs; no part is broken."""
        lines: list[str] = []
        for part in parts:
            if lines and len(lines[-1]) + len(part) < self.width - len(INDENT) - len("     \\"):
                lines[-1] += f" {part}"
            else:
                lines.append(part)
        for number, line in enumerate(lines):
            prompt = "    " if number else "$ "
            self.line(self.bold(prompt + line + (" \\" if line is not lines[-1] else "")))

    def columns(self, titles: tuple[str, str], left: str, right: str, hand_over: int) -> None:
        """Two texts side by side; ``right`` was handed over after ``hand_over`` characters.

        The hand-over is shown at the nearest word: ``‖`` in place of the space before it.
        """
        width = (self.width - len(INDENT) - len(GUTTER)) // 2
        left_lines = [" ".join(words) for words in wrapped_words(left.split(), width)]
        moved_at = len(right[:hand_over].split())
        right_lines: list[str] = []
        position = 0
        for words in wrapped_words(right.split(), width):
            before, after = (
                words[: max(0, moved_at - position)],
                words[max(0, moved_at - position) :],
            )
            joint = HAND_OVER if before and after else ""
            right_lines.append(" ".join(before) + joint + self.cyan(" ".join(after)))
            position += len(words)
        rows = max(len(left_lines), len(right_lines))
        left_lines += [""] * (rows - len(left_lines))
        right_lines += [""] * (rows - len(right_lines))
        self.line(self.bold(titles[0].ljust(width)) + self.dim(GUTTER) + self.bold(titles[1]))
        for one, other in zip(left_lines, right_lines, strict=True):
            self.line(one.ljust(width) + self.dim(GUTTER) + other)

    # ---- waiting --------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def waiting(self, text: str) -> AsyncIterator[None]:
        """Show that something is being waited for, and for how long."""
        ticking = asyncio.create_task(self._tick(text))
        try:
            yield
        finally:
            ticking.cancel()
            self.rewrite("")

    async def _tick(self, text: str) -> None:
        started_s = time.monotonic()
        for tick in range(sys.maxsize):
            seconds = time.monotonic() - started_s
            if self.is_terminal:
                spinner = self.cyan(SPINNER[tick % len(SPINNER)])
                self.rewrite(f"{INDENT}{spinner} {text} {self.dim(f'{seconds:.0f} s')}")
                await asyncio.sleep(SPINNER_INTERVAL_S)
            else:
                if tick:
                    self.line(f"… {text} {seconds:.0f} s")
                await asyncio.sleep(HEARTBEAT_S)

    def rewrite(self, text: str) -> None:
        """On a terminal: replace the line that is being written, which the next one erases."""
        if self.is_terminal:
            print(f"\r\033[K{text}", end="", file=self._stream, flush=True)


class Running:
    """A text that is printed as it comes, in whole lines behind a label, once it has one.

    Args:
        alone: nothing else is printed meanwhile, so that a terminal can show the last line grow.
    """

    def __init__(self, screen: Screen, label: str = "", *, alone: bool = False) -> None:
        self.label = label
        self._screen = screen
        self._alone = alone
        self._pending = ""

    def feed(self, text: str) -> None:
        """Take in more of the text; print the lines that are full."""
        self._pending += text
        if not self.label or not self._pending:
            return
        width = self._screen.width - len(INDENT) - len(self.label) - len(GUTTER)
        # All lines but the last are full: the word that is still growing only gets longer.
        *full, last = wrapped_words(self._pending.split(), width)
        for words in full:
            self._screen.line(self._labelled(" ".join(words)))
        if full:
            self._pending = " ".join(last) + (" " if self._pending[-1].isspace() else "")
        if self._alone:
            self._screen.rewrite(INDENT + self._labelled(" ".join(last)))

    def flush(self) -> None:
        """Print what is left."""
        if self._pending.strip():
            self._screen.line(self._labelled(" ".join(self._pending.split())))
        self._pending = ""

    def _labelled(self, text: str) -> str:
        return self._screen.cyan(self.label) + self._screen.dim(GUTTER) + text


def wrapped_words(words: Sequence[str], width: int) -> list[list[str]]:
    """Words in lines of at most ``width`` characters; a longer word has a line of its own."""
    lines: list[list[str]] = [[]]
    used = 0
    for word in words:
        if lines[-1] and used + 1 + len(word) > width:
            lines.append([])
            used = 0
        used += len(word) + (1 if lines[-1] else 0)
        lines[-1].append(word)
    return lines
