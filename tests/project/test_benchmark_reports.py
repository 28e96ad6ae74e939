"""A benchmark's figures know their goals, and the docs are written from what was measured."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from benchmarks import _report, fidelity, run_all
from benchmarks._report import Figure, Report, Table, main, markdown
from scripts.pages import number

CHECKOUT = Path(__file__).parents[2]


def make_figure(
    value: float, *, at_most: float | None = None, at_least: float | None = None
) -> Figure:
    return Figure(name="dispatch p50", value=value, unit="us", at_most=at_most, at_least=at_least)


@pytest.mark.parametrize(
    ("figure", "goal", "holds"),
    [
        (make_figure(12.0), None, None),
        (make_figure(20.0, at_most=20.0), "at most 20 us", True),
        (make_figure(20.1, at_most=20.0), "at most 20 us", False),
        (make_figure(0.97, at_least=0.97), "at least 0.97 us", True),
        (make_figure(0.96, at_least=0.97), "at least 0.97 us", False),
        (make_figure(3.0, at_least=1.0, at_most=2.0), "at least 1 us, at most 2 us", False),
        (make_figure(float("nan"), at_most=20.0), "at most 20 us", False),
    ],
)
def test_a_figure_knows_its_goal(figure: Figure, goal: str | None, holds: bool | None) -> None:
    assert (figure.goal, figure.holds) == (goal, holds)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (1.0, "1"),
        (4.567, "4.57"),
        (99.96, "100"),
        (12_345.0, "12,300"),
        (-4.567, "-4.57"),
        (7, "7"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


def measure(quick: bool) -> Report:
    """A benchmark of nothing."""
    return Report(
        figures=[make_figure(12.0 if quick else 25.0, at_most=20.0)],
        tables=[Table(title="By size", columns=["instances", "us"], rows=[["16", 3.14159]])],
        notes=["Growth is linear."],
    )


def test_a_report_says_what_was_missed_in_print_and_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "report.json"
    assert main(measure, ["--json", str(written)]) == 0
    assert "| dispatch p50 | 25 us | at most 20 us | **missed** |" in capsys.readouterr().out
    content = json.loads(written.read_text(encoding="utf-8"))
    assert content["figures"] == [
        {
            "name": "dispatch p50",
            "value": 25.0,
            "unit": "us",
            "goal": "at most 20 us",
            "holds": False,
        }
    ]
    assert "cores" in content["machine"]


def test_a_quick_report_says_so() -> None:
    text = markdown(measure(True).as_json(machine="a machine", quick=True))
    assert "| dispatch p50 | 12 us | at most 20 us | met |" in text
    assert "### By size\n\n| instances | us |\n| --- | --- |\n| 16 | 3.14 |" in text
    assert "Measured on: a machine.\n\nThis was a quick run" in text


def test_a_module_is_a_benchmark_when_it_declares_itself(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text('"""Why."""\nBENCHMARK = "One"\nimport no_such_module\n')
    (tmp_path / "_report.py").write_text('"""A helper that mentions BENCHMARK = "x"."""\n')
    assert run_all.discover(tmp_path) == [
        run_all.Benchmark(name="one", title="One", introduction="Why.")
    ]


def test_the_pages_are_written_from_the_reports_that_are_kept(tmp_path: Path) -> None:
    measured = run_all.Benchmark(name="one", title="One", introduction="Why.")
    not_yet = run_all.Benchmark(name="two", title="Two", introduction="Why not.")
    (tmp_path / "benchmarks").mkdir()
    content = measure(False).as_json(machine="a machine", quick=False)
    (tmp_path / "benchmarks" / "one.json").write_text(json.dumps(content))

    run_all.write_docs([measured, not_yet], docs=tmp_path)

    overview = (tmp_path / "benchmarks.md").read_text()
    assert "## [One](benchmarks/one.md)" in overview
    assert "Two" not in overview
    page = (tmp_path / "benchmarks" / "one.md").read_text()
    assert "# One\n\nWhy." in page
    assert "### By size" in page
    assert not (tmp_path / "benchmarks" / "two.md").exists()


def test_what_clients_see_comes_before_the_microseconds_of_decisions() -> None:
    overview = (CHECKOUT / "docs" / "benchmarks.md").read_text()
    known = {benchmark.name for benchmark in run_all.discover(CHECKOUT / "benchmarks")}
    assert set(run_all.FIRST) <= known
    assert overview.index("(benchmarks/migration.md)") < overview.index("(benchmarks/decisions.md)")


def make_package(folder: Path) -> None:
    """A folder that is the `benchmarks` of whoever runs beside it, whatever PYTHONPATH names."""
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder.parent / "scripts").symlink_to(CHECKOUT / "scripts")


def test_a_run_reports_missed_goals_and_fails_only_for_a_failed_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "benchmarks"
    make_package(folder)
    program = (
        'from benchmarks._report import Figure, Report, main\nBENCHMARK = "{title}"\n'
        "def run(quick):\n    {body}\n"
        "main(run)\n"
    )
    figure = 'Figure(name="ITL ratio", value=1.5, unit="", at_most=1.03)'
    good = program.format(title="Good", body=f"return Report(figures=[{figure}])")
    (folder / "good.py").write_text(good)
    (folder / "_report.py").symlink_to(run_all.FOLDER / "_report.py")
    monkeypatch.setattr(run_all, "FOLDER", folder)
    monkeypatch.setattr(run_all, "DOCS", tmp_path / "docs")

    assert run_all.main([]) == 0
    printed = capsys.readouterr().out
    assert "0 of 1 goals met" in printed
    assert "missed: ITL ratio: 1.5 (goal: at most 1.03)" in printed
    assert "**missed**" in (tmp_path / "docs" / "benchmarks" / "good.md").read_text()

    (folder / "bad.py").write_text(program.format(title="Bad", body='raise SystemExit("no room")'))
    assert run_all.main(["bad", "--quick"]) == 1
    assert "failed to run: bad" in capsys.readouterr().out


def test_a_benchmark_that_lacks_its_data_is_skipped_and_its_page_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, kept = tmp_path / "benchmarks", tmp_path / "docs" / "benchmarks" / "lacking.json"
    make_package(folder)
    (folder / "lacking.py").write_text(
        f'import sys\nBENCHMARK = "Lacking"\nsys.exit({_report.SKIPPED})\n'
    )
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps(measure(False).as_json(machine="a machine", quick=False)))
    before = kept.read_text()
    monkeypatch.setattr(run_all, "FOLDER", folder)
    monkeypatch.setattr(run_all, "DOCS", tmp_path / "docs")

    assert run_all.main([]) == 0
    assert "skipped: lacking" in capsys.readouterr().out
    assert kept.read_text() == before
    assert "[Lacking]" in (tmp_path / "docs" / "benchmarks.md").read_text()


def test_fidelity_says_which_data_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LLUMSCHED_DATA", raising=False)
    assert fidelity.main([]) == _report.SKIPPED
    assert fidelity.main([str(tmp_path)]) == _report.SKIPPED
    assert "it needs the public runs, in DATA/traces/measured" in capsys.readouterr().err


@pytest.mark.slow
def test_a_benchmark_that_hangs_is_interrupted_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "benchmarks"
    make_package(folder)
    (folder / "slow.py").write_text(
        'import time\nfrom benchmarks._report import Report, main\nBENCHMARK = "Slow"\n'
        "def run(quick):\n    try:\n        time.sleep(600)\n"
        "    finally:\n        print('its servers are stopped', flush=True)\n"
        "main(run)\n"
    )
    (folder / "_report.py").symlink_to(run_all.FOLDER / "_report.py")
    monkeypatch.setattr(run_all, "FOLDER", folder)
    assert run_all.main(["slow", "--quick", "--timeout-s", "8"]) == 1
    printed = capfd.readouterr()
    assert "slow: not done after 8 s" in printed.err
    assert "its servers are stopped" in printed.out


def test_an_unknown_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_all.main(["no_such_benchmark"])
    assert "there is no benchmark no_such_benchmark" in capsys.readouterr().err


def test_sigterm_unwinds_a_benchmark() -> None:
    """So that the servers it has started end with it."""
    unwound = False

    def interrupted(quick: bool) -> Report:
        nonlocal unwound
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            unwound = True
        raise AssertionError("SIGTERM was ignored")

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            main(interrupted, [])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert unwound
