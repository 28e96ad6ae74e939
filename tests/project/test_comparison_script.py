"""The comparison's script goes on where it was cut short, and takes rates from its own page."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.compare_policies import rates_of
from scripts.comparison import kept
from scripts.comparison.kept import Kept
from scripts.comparison.workloads import WORKLOADS

PAGE = Path(__file__).parents[2] / "docs" / "comparison.md"


def test_what_is_kept_is_not_made_again_until_the_code_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make() -> str:
        made.append("once")
        return "result"

    assert Kept(tmp_path).get("run 1", make) == "result"
    assert Kept(tmp_path).get("run 1", make) == "result"
    assert len(made) == 1
    Kept(tmp_path).get("run 2", make)
    assert len(made) == 2
    monkeypatch.setattr(kept, "_code", lambda: "other code")
    Kept(tmp_path).get("run 1", make)
    assert len(made) == 3
    # Nothing half-written is left.
    assert {path.suffix for path in tmp_path.iterdir()} == {".pickle"}


def test_without_a_folder_everything_is_made() -> None:
    made: list[int] = []
    for _ in range(2):
        Kept(None).get("run", lambda: made.append(1))
    assert len(made) == 2


def test_the_page_names_the_capacity_of_every_workload() -> None:
    rates = rates_of(PAGE.read_text(encoding="utf-8"), WORKLOADS)
    assert set(rates) == set(WORKLOADS)
    assert all(rate > 0 for rate in rates.values())


def test_a_page_without_a_workload_says_so() -> None:
    with pytest.raises(SystemExit, match="names no capacity for chat"):
        rates_of("## Code\n", WORKLOADS[:1])
