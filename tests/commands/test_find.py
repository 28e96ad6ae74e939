"""``simulate --find``: how many instances, or how high a rate, keep an objective."""

from __future__ import annotations

import pytest

from llumsched import cli

TRAFFIC = ("M-M", "--requests", "120", "--quiet", "--slo-ttft-s", "1")


def test_the_fewest_instances_are_named_beside_one_less(
    capsys: pytest.CaptureFixture[str],
) -> None:
    search = ["--rate", "30", "--find", "instances", "--attainment", "0.95"]
    assert cli.main(["simulate", *TRAFFIC, *search, "--compare", "latency,round_robin"]) == 0
    *table, latency, round_robin = capsys.readouterr().out.splitlines()
    assert latency.startswith("latency: ")
    assert " instances keep it for " in round_robin
    assert "note: Poisson arrivals at 30 requests/s, seed 0" in table
    found, less = int(latency.split()[1]), int(latency.split(";")[1].split()[0])
    assert found == less + 1
    (shares,) = [line for line in table if line.startswith("SLO kept")]
    assert float(shares.split()[3]) >= 95


def test_the_highest_rate_is_named_beside_a_higher_one(capsys: pytest.CaptureFixture[str]) -> None:
    search = ["--instances", "1", "--find", "rate", "--attainment", "0.9"]
    assert cli.main(["simulate", *TRAFFIC, *search]) == 0
    printed = capsys.readouterr()
    said = printed.out.splitlines()[-1]
    # Too few requests for a pool in its stride, on a machine that they do not say was full.
    assert "warning: adaptive: SHORT RUN: 120 requests arrive within " in printed.err
    found, beyond = float(said.split()[1]), float(said.split(";")[1].split()[0])
    assert found < beyond <= 1.03 * found


def test_the_answer_has_the_verdict_and_the_warnings_of_a_run_at_that_size(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hardware = ["--hardware", "h100-llama-3.1-8b", "--find", "instances", "--slo-ttft-s", "5"]
    traffic = ["S-S", "--rate", "1", "--requests", "60", "--quiet"]
    assert cli.main(["simulate", *traffic, *hardware]) == 0
    printed = capsys.readouterr()
    assert "adaptive: nearly idle: " in printed.out
    assert printed.out.splitlines()[-1] == "adaptive: 1 instance keeps it for 100.0%"
    assert "warning: adaptive: NO HOST TIME: " in printed.err
    assert "SHORT RUN" not in printed.err


def test_what_no_size_keeps_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    bound = ["--slo-tpot-s", "0.000001", "--find", "instances", "--requests", "5"]
    assert cli.main(["simulate", "S-S", *bound, "--quiet"]) == 0
    assert "nothing keeps it: 5 instances keep it for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--find", "rate"], "--find rate needs a bound to keep"),
        (["--attainment", "0.9"], "--attainment is of a search"),
        (["--find", "rate", "--slo-ttft-s", "1", "--attainment", "2"], "above 0, at most 1"),
        (["--find", "rate", "--slo-ttft-s", "1", "--out", "x"], "--out is of a single size"),
    ],
)
def test_a_search_without_an_aim_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", "S-S", *arguments]) == 1
    assert said in capsys.readouterr().err
