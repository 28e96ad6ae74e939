"""Fast tests are those that start nothing; the marks that leave out the others name real places."""

from __future__ import annotations

import re

import pytest

from tests.marks import MARKS, marks_of
from tests.wheels import ROOT

STARTS = re.compile(r"ray\.init\(|llumsched\(model|LlumschedEngineCore\(|prepare_model\(\)")


def test_every_marked_place_is_there() -> None:
    assert [place for place in MARKS if not (ROOT / place).exists()] == []


@pytest.mark.parametrize(
    ("path", "marks"),
    [
        ("tests/e2e/test_api.py", ("engine", "ray")),
        ("tests/migration/test_exact.py", ("engine",)),
        ("tests/migration/test_destination.py", ()),
        ("tests/core/test_scheduler.py", ()),
        ("tests/e2e_other/test_api.py", ()),
    ],
)
def test_what_is_nearest_to_a_test_counts(path: str, marks: tuple[str, ...]) -> None:
    assert marks_of(path) == marks


def test_what_starts_something_is_marked() -> None:
    unmarked = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if STARTS.search(path.read_text())
        and not marks_of(path.relative_to(ROOT).as_posix())
        # They prepare a model, or read its configuration, and start nothing.
        and path.name not in ("test_marks.py", "test_prepare_model.py", "test_refused_flags.py")
    ]
    assert unmarked == []
