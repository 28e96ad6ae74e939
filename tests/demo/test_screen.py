"""Printed text reads the same in a pipe: whole lines, wrapped, no control characters."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st

from scripts.demo.screen import GUTTER, HAND_OVER, Running, Screen, wrapped_words


def printed(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


@given(
    st.text(alphabet="ab \n", max_size=400),
    st.lists(st.integers(1, 12), min_size=1, max_size=80),
)
def test_a_text_that_comes_in_pieces_loses_no_word(text: str, sizes: list[int]) -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    running = Running(screen, "instance-0")
    position = 0
    for size in [*sizes, len(text)]:
        running.feed(text[position : position + size])
        position += size
    running.flush()
    lines = [line.partition(GUTTER.rstrip())[2] for line in printed(stream)]
    # A word that was longer than a line may be on several; nothing else may differ.
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert all(len(line) <= screen.width or len(line.split()) == 3 for line in printed(stream))


def test_lines_come_as_soon_as_they_are_full() -> None:
    stream = io.StringIO()
    running = Running(Screen(stream), "chat 1")
    running.feed("word " * 16)
    assert printed(stream) == []
    running.feed("word " * 4)
    assert len(printed(stream)) == 1


def test_nothing_is_printed_before_the_label_is_known() -> None:
    stream = io.StringIO()
    running = Running(Screen(stream))
    running.feed("word " * 40)
    assert printed(stream) == []
    running.label = "instance-1"
    running.feed("end")
    running.flush()
    assert all(line.startswith("  instance-1 │ word") for line in printed(stream))
    assert printed(stream)[-1].endswith("end")


def test_the_hand_over_stands_at_its_word() -> None:
    stream = io.StringIO()
    Screen(stream).columns(("one", "other"), "a b c d", "a b c d", hand_over=len("a b"))
    assert printed(stream)[1].split(GUTTER)[1] == f"a b{HAND_OVER}c d"
    assert printed(stream)[1].split(GUTTER)[0].split() == ["a", "b", "c", "d"]


def test_columns_of_different_length_keep_their_sides() -> None:
    stream = io.StringIO()
    Screen(stream).columns(("one", "other"), "short", "word " * 30, hand_over=0)
    assert all(line.count(GUTTER.rstrip()) == 1 for line in printed(stream))


def test_a_command_can_be_copied() -> None:
    stream = io.StringIO()
    parts = ["llumsched", "serve", "model", *[f"--flag-{n} value" for n in range(12)]]
    Screen(stream).command(parts)
    lines = printed(stream)
    assert all(len(line) <= 96 for line in lines)
    assert " ".join(line.strip().rstrip("\\").strip() for line in lines) == "$ " + " ".join(parts)


@given(st.lists(st.text(alphabet="ab", min_size=1, max_size=9)), st.integers(4, 20))
def test_wrapping_keeps_the_words_and_the_width(words: list[str], width: int) -> None:
    lines = wrapped_words(words, width)
    assert [word for line in lines for word in line] == words
    assert all(len(" ".join(line)) <= width or len(line) == 1 for line in lines)
