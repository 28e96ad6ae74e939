"""Faults in the options of a batch process are said first, in a sentence that names the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from llumsched import cli


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--url", "nope"], "--url nope: give the whole address, such as http://127.0.0.1:8000"),
        (["--url", "http://"], "--url http://: give the whole address"),
        (["--database", "mysql://a/b"], "mysql://a/b: give SQLite's or PostgreSQL's URL, such as"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to others: give --client-key as well"),
        (["--jobs", "none.yaml"], "none.yaml: cannot be read: No such file or directory"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["batch", *arguments]) != 0
    printed = capsys.readouterr().err
    assert sentence in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_a_front_door_wants_the_whole_address(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--backend", "http://127.0.0.1:9", "--batch-url", "nope"])
    assert "nope: give the whole address" in capsys.readouterr().err
