"""``llumsched simulate`` and ``sweep``: what they print and write, and say to mistakes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llumsched
from llumsched import cli
from llumsched.commands import simulate as command
from llumsched.simulator.results.result import SimulationResult
from llumsched.simulator.simulation import simulate
from llumsched.simulator.traces.loaders import load_trace
from scripts import example_trace

ROOT = Path(llumsched.__file__).parents[1]
# A small cluster that is quick to simulate.
SMALL = ("S-S", "--rate", "20", "--requests", "60", "--instances", "2", "--quiet")

WITHOUT_SERVING = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "torch", "vllm", "zmq", "psutil"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from llumsched.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_it_runs_with_nothing_of_serving_installed() -> None:
    program = [sys.executable, "-c", WITHOUT_SERVING, "simulate", *SMALL]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "TTFT P99 (s)" in done.stdout


def test_a_comparison_is_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--compare", "latency,round_robin", "--seeds", "2", "--out", str(out)]
    assert cli.main(["simulate", *SMALL, *arguments, "--chrome-trace", "--slo-ttft-s", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["latency", "round_robin"]
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "summary.json",
        "chrome-trace-latency-0.json",
        "chrome-trace-round_robin-0.json",
        *(f"requests-{name}-{seed}.csv" for name in ("latency", "round_robin") for seed in (0, 1)),
    }
    summary = json.loads((out / "summary.json").read_text())
    assert [run["seed"] for run in summary["runs"]] == [0, 0, 1, 1]
    assert summary["runs"][0]["summary"]["num_finished"] == 60
    with (out / "requests-latency-0.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 60


def test_a_configuration_file_is_a_policy_by_the_name_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("policy: infaas\nscheduler: {migration_interval_s: 0.5}\n")
    assert cli.main(["simulate", *SMALL, "--compare", f"latency,{file}"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["latency", "mine"]


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert cli.main(["simulate", *SMALL, "--out", str(tmp_path / name)]) == 0
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_interrupted_run_leaves_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **options: Any) -> SimulationResult:
        os.kill(os.getpid(), signal.SIGINT)
        return simulate(*args, **options)

    monkeypatch.setattr(command, "simulate", interrupted)
    before = signal.getsignal(signal.SIGINT)
    longer = [*SMALL, "--requests", "3000"]
    arguments = ["simulate", *longer, "--compare", "latency,round_robin", "--out", str(tmp_path)]
    assert cli.main(arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    (run,) = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert (run["policy"], run["is_complete"]) == ("latency", False)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    # The handler is gone with the command.
    assert signal.getsignal(signal.SIGINT) is before


def test_a_missing_pyarrow_is_said_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    out = tmp_path / "out"
    assert cli.main(["simulate", *SMALL, "--parquet", "--out", str(out)]) == 1
    assert "pip install 'llumsched[parquet]'" in capsys.readouterr().err
    assert not out.exists()


def test_a_reader_that_leaves_is_no_mistake() -> None:
    program = [sys.executable, "-m", "llumsched", "simulate", *SMALL]
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    assert reader.stdin is not None
    with reader.stdin as pipe:
        # As in a shell: all of it is in the buffer until the end.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
        done = subprocess.run(
            program, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    assert "Broken pipe" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["S-X"], "unknown traffic: 'S-X'; did you mean 'S-S'? (and there is no such file)"),
        (["missing.csv"], "missing.csv: cannot be read: No such file or directory"),
        (["S-S", "--policy", "latancy"], "unknown policy 'latancy'; did you mean 'latency'?"),
        (["S-S", "--policy", "missing.yaml"], "missing.yaml: cannot be read"),
        (["S-S", "--hardware", "a10-lama-7b"], "did you mean 'a10-llama-7b'?"),
        (["S-S", "--high-share", "2"], "high_share must be at least 0, at most 1, not 2.0"),
        (["S-S", "--fail", "9@1"], "failures names instance 9; there are 0 to 3"),
        (["S-S", "--fail", "soon"], "fail='soon' must be INSTANCE@SECONDS"),
        (["S-S", "--seeds", "0"], "--seeds 0: at least 1 is needed"),
        (["S-S", "--parquet"], "need --out DIR"),
        (["S-S", "--compare", ","], "--compare: name policies with commas between"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_fix(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", *arguments, "--quiet"]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_sweep_has_a_row_a_point_and_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.csv"
    grid = ["--grid", "policy=latency,round_robin", "--grid", "instances=1,2"]
    traffic = ["S-S", "--rate", "20", "--requests", "30", "--quiet"]
    assert cli.main(["sweep", *traffic, *grid, "--seeds", "2", "--out", str(out)]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["policy"], row["instances"], row["seed"]) for row in rows] == [
        (policy, instances, seed)
        for policy in ("latency", "round_robin")
        for instances in ("1", "2")
        for seed in ("0", "1")
    ]
    assert all(row["finished (%)"] == "100.0" for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4 + 2


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ("polcy=a", "--grid: unknown option: 'polcy'; did you mean 'policy'?"),
        ("instances=two", "the values of instances must be int"),
        ("instances=0", "instances must be at least 1, not 0"),
        ("policy=latency,fast", "unknown policy 'fast'"),
    ],
)
def test_a_mistake_in_a_grid_is_named(
    axis: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sweep", "S-S", "--grid", axis, "--quiet"]) == 1
    assert said in capsys.readouterr().err


def test_the_trace_that_ships_is_the_one_that_its_script_makes(tmp_path: Path) -> None:
    made = example_trace.example_trace()
    shipped = load_trace(example_trace.PATH)
    assert shipped.arrival_s.tolist() == made.arrival_s.tolist()
    assert shipped.num_prompt_tokens.tolist() == made.num_prompt_tokens.tolist()
    assert shipped.prefix_hashes == made.prefix_hashes
