"""No result without its truth: what ``simulate`` and ``sweep`` say beside the figures."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

import llumsched
from llumsched import cli

ROOT = Path(llumsched.__file__).parents[1]
SMALL = ("S-S", "--rate", "20", "--requests", "60", "--instances", "2", "--quiet")
RECORDED = ("example", "--requests", "40", "--hardware", "rtx4090-llama-3.1-8b", "--quiet")

POLICIES = '''
class Raises:
    def dispatch(self, request, cluster):
        raise KeyError("typo")

class Nonsense:
    def dispatch(self, request, cluster):
        return request.request_id

class Typo:
    """A migration policy with a wrong name of a field."""

    def rebalance(self, cluster):
        from llumsched.core.policy import MigrationPair
        return [MigrationPair(source_id="instance-0", destination="instance-1", reason="")]

class Shuffled:
    def choose(self, candidates):
        raise RuntimeError("no victim")
'''


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of policies that fail, each in a way of its own."""
    name = f"broken_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(POLICIES)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def columns_of(printed: str) -> list[str]:
    return printed.splitlines()[0].split()


def test_a_policy_and_its_tuned_copy_have_a_column_and_files_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tmp_path / "latency.yaml"
    shutil.copy(ROOT / "configs" / "latency.yaml", tuned)
    out = tmp_path / "out"
    compare = ["--compare", f"latency,{tuned}", "--out", str(out), "--decision-log"]
    assert cli.main(["simulate", *RECORDED, *compare]) == 0
    assert columns_of(capsys.readouterr().out) == ["latency", "latency.yaml"]
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "summary.json",
        *(f"{what}-{name}-0{end}" for what, end in (("requests", ".csv"), ("decisions", ""))
          for name in ("latency", "latency.yaml")),
    }  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert [run["policy"] for run in summary["runs"]] == ["latency", "latency.yaml"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compare", "latency,latency"], "--compare names 'latency' twice"),
        (["--compare", "latency", "--policy", "infaas"], "name 'infaas' in --compare"),
    ],
)
def test_no_policy_is_left_out_without_a_word(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", *SMALL, *arguments]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "policy=latency,latency"], "latency is named twice"),
        (["--grid", "rate=1", "--grid", "rate_rps=2"], "rate_rps is given by two --grid"),
        (["--policy", "infaas", "--grid", "policy=latency"], "given by --grid and --policy"),
    ],
)
def test_nothing_of_a_grid_is_left_out_without_a_word(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    traffic = ["S-S", "--requests", "30", "--quiet"]
    assert cli.main(["sweep", *traffic, *arguments]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "error", "line"),
    [
        ("Raises", "KeyError: 'typo'", 'raise KeyError("typo")'),
        ("Nonsense", "answered 'r0', not Placement", ""),
    ],
)
def test_a_policy_that_fails_is_said_everywhere_and_ends_with_an_error(
    broken: str,
    name: str,
    error: str,
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    policy = ["--policy", f"{broken}:{name}"]
    assert cli.main(["simulate", *SMALL, *policy, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert error in printed.out
    assert "the scheduler decided by itself" in printed.out
    assert printed.out.splitlines()[-1].startswith("written: ")
    # Once, of sixty requests.
    assert printed.err.count("Traceback") == bool(line)
    assert line in printed.err
    assert "--allow-policy-failures" in printed.err
    summary = json.loads((out / "summary.json").read_text())
    failures = summary["runs"][0]["policy_failures"]
    assert sum(failure["count"] for failure in failures) == 60
    assert failures[0]["policy"] == name
    assert any(error in failure["error"] for failure in failures)
    assert any(error in remark for remark in summary["remarks"])
    assert error.replace("<", "") in (out / "report.html").read_text()
    assert cli.main(["simulate", *SMALL, *policy, "--allow-policy-failures"]) == 0


@pytest.mark.parametrize(
    ("part", "name", "error"),
    [("migration", "Typo", "TypeError"), ("victim", "Shuffled", "RuntimeError: no victim")],
)
def test_a_part_that_fails_is_said_as_well(
    broken: str,
    part: str,
    name: str,
    error: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"policy: latency\nparts: {{{part}: {{name: '{broken}:{name}'}}}}\n")
    traffic = ["M-M", "--rate", "20", "--requests", "200", "--instances", "2", "--quiet"]
    assert cli.main(["simulate", *traffic, "--policy", str(config)]) == 1
    assert f"policy {name} failed: {error}" in capsys.readouterr().out


def test_a_sweep_over_a_policy_that_fails_ends_with_an_error(
    broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.csv"
    grid = ["--grid", f"policy=latency,{broken}:Raises", "--jobs", "1", "--out", str(rows)]
    traffic = ["S-S", "--requests", "30", "--quiet"]
    assert cli.main(["sweep", *traffic, *grid]) == 1
    printed = capsys.readouterr()
    assert f"policy={broken}:Raises: policy Raises failed: KeyError: 'typo'" in printed.out
    assert printed.err.count("Traceback") == 1
    with rows.open() as file:
        assert [row["policy_failures"] for row in csv.DictReader(file)] == ["", "30.0"]
    assert cli.main(["sweep", *traffic, *grid, "--allow-policy-failures"]) == 0


def test_a_rejection_names_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["simulate", "L-L", "--requests", "50", "--max-model-len", "500", "--quiet"]) == 0
    )
    printed = capsys.readouterr().out
    assert "rejected: a prompt of 500 tokens or more: an instance takes no more than" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["L-L", "--rate", "50"], "saturated: half of the requests wait more than"),
        (["S-S", "--rate", "0.5"], "nearly idle: the KV cache is"),
    ],
)
def test_a_pool_that_is_too_small_or_too_large_is_told(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = ["--policy", "latency", "--requests", "150", "--quiet"]
    assert cli.main(["simulate", *arguments, *scale]) == 0
    assert said in capsys.readouterr().out


def test_identical_seeds_are_one_run_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    compare = ["--compare", "round_robin,random", "--seeds", "3", "--out", str(out)]
    assert cli.main(["simulate", *RECORDED, *compare]) == 0
    assert "one run under round_robin is all 3 seeds" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    runs = [(run["policy"], run["seed"]) for run in summary["runs"]]
    assert runs == [("round_robin", 0), *(("random", seed) for seed in range(3))]


def test_resampled_seeds_are_runs_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--policy", "round_robin", "--seeds", "3", "--resample", "--out", str(tmp_path)]
    assert cli.main(["simulate", *RECORDED, *options]) == 0
    assert "is all 3 seeds" not in capsys.readouterr().out
    files = {path.read_bytes() for path in tmp_path.glob("requests-round_robin-*.csv")}
    assert len(files) == 3


def test_a_sweep_runs_one_seed_where_seeds_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.csv"
    options = ["--seeds", "2", "--jobs", "1", "--out", str(rows)]
    assert cli.main(["sweep", *RECORDED, "--grid", "policy=round_robin,random", *options]) == 0
    assert "one run is all 2 seeds" in capsys.readouterr().out
    with rows.open() as file:
        found = [(row["policy"], row["seed"]) for row in csv.DictReader(file)]
    assert found == [("round_robin", "0"), ("random", "0"), ("random", "1")]


def test_a_sweep_says_once_why_its_figures_may_not_be_believed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "sweep.html"
    options = ["--grid", "policy=round_robin,latency", "--jobs", "1", "--report", str(page)]
    assert cli.main(["sweep", *RECORDED, *options]) == 0
    said = capsys.readouterr().err
    assert said.count("NO HOST TIME") == 1
    assert "warning: every point: NO HOST TIME: rtx4090-llama-3.1-8b has kernel times" in said
    assert "NO HOST TIME" in page.read_text()


@pytest.mark.parametrize("option", ["--rate", "--rate-rps"])
def test_the_rate_has_a_short_name(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", "S-S", option, "30", "--requests", "20", "--quiet"]) == 0
    assert "arrivals at 30 requests/s" in capsys.readouterr().out


def test_goodput_does_not_count_the_drain(tmp_path: Path) -> None:
    """Few long answers at the end: what keeps its bounds arrives at the rate of the trace."""
    trace = tmp_path / "tail.csv"
    rows = [f"{second},10,10" for second in range(20)] + ["20,10,3000"]
    trace.write_text("arrival_s,num_prompt_tokens,num_output_tokens\n" + "\n".join(rows) + "\n")
    out = tmp_path / "out"
    options = ["--slo-ttft-s", "60", "--out", str(out), "--quiet"]
    assert cli.main(["simulate", str(trace), *options]) == 0
    summary = json.loads((out / "summary.json").read_text())["runs"][0]["summary"]
    assert summary["duration_s"] > 100
    assert (summary["goodput_rps"], summary["slo_attainment"]) == pytest.approx((1.0, 1.0))
