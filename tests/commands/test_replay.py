"""``llumsched replay``: decisions one can read, failures counted, results of several policies."""

from __future__ import annotations

from pathlib import Path

import pytest

from llumsched import cli

TRAFFIC = ("S-S", "--rate", "20", "--requests", "40", "--instances", "2", "--quiet")


def simulated(out: Path, *arguments: str) -> None:
    cli.main(["simulate", *TRAFFIC, *arguments, "--out", str(out), "--decision-log"])


def test_a_folder_of_results_is_replayed_a_log_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulated(tmp_path, "--compare", "latency,random")
    capsys.readouterr()
    assert cli.main(["replay", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.split("\n\n")
    assert [part.splitlines()[0] for part in lines] == ["decisions-latency-0", "decisions-random-0"]
    assert all("every decision identical" in part for part in lines)


def test_a_failing_policy_is_counted_though_every_decision_is_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_replay.py").write_text(
        "class Broken:\n    def dispatch(self, request, cluster):\n        raise KeyError('typo')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    simulated(tmp_path / "out", "--policy", "broken_replay:Broken")
    capsys.readouterr()
    (log,) = (tmp_path / "out").glob("decisions-*")
    assert cli.main(["replay", str(log)]) == 0
    printed = capsys.readouterr().out
    assert (
        "40 recorded decisions were the scheduler's own: policy Broken failed: KeyError" in printed
    )
    assert "every decision identical" in printed


def test_decisions_are_printed_with_their_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulated(tmp_path, "--policy", "round_robin")
    capsys.readouterr()
    assert cli.main(["replay", str(tmp_path), "--decisions"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "DispatchRequest(" in line and "reason=" in line]) == 40


def test_one_request_is_followed_from_its_arrival(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulated(tmp_path, "--policy", "round_robin")
    capsys.readouterr()
    assert cli.main(["replay", str(tmp_path), "--request", "r7"]) == 0
    about = [line for line in capsys.readouterr().out.splitlines() if " s  " in line]
    assert [line.split("(")[0].split()[-1] for line in about] == [
        "RequestArrived",
        "DispatchRequest",
        "RequestFinished",
    ]
    assert cli.main(["replay", str(tmp_path), "--request", "r77"]) == 1
    assert "no decision is about a request 'r77'" in capsys.readouterr().err
