"""Written results read back as what they were."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumsched.simulator.results.chrome_trace import write_chrome_trace
from llumsched.simulator.results.export import (
    ExportError,
    quantile_curve,
    write_csv,
    write_parquet,
    write_trace,
)
from llumsched.simulator.traces.loaders import load_trace
from llumsched.simulator.traces.trace import make_trace
from tests.simulator.results import make_result


def test_records_as_csv_leave_empty_what_never_happened(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    write_csv(make_result(), path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished", "finished", "rejected", "unfinished"]
    assert [row["instance"] for row in rows] == ["i1", "i0", "", "i0"]
    assert [row["tpot_s"] for row in rows] == ["0.2", "", "", ""]
    assert rows[2]["finished_s"] == ""
    assert float(rows[0]["e2e_s"]) == 3.0


def test_records_as_parquet_are_those_of_the_csv(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_parquet(make_result(), tmp_path / "requests.parquet")
    table = parquet.read_table(tmp_path / "requests.parquet").to_pydict()
    assert table["status"] == ["finished", "finished", "rejected", "unfinished"]
    assert table["tpot_s"] == [0.2, None, None, None]
    assert table["num_migrations"] == [1, 0, 0, 0]


def test_without_pyarrow_the_error_names_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ExportError, match=r"pip install 'llumsched\[parquet\]', or use the CSV"):
        write_parquet(make_result(), tmp_path / "requests.parquet")


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e6), st.integers(1, 10**6), st.integers(1, 10**5), st.integers(0, 1)
        ),
        min_size=1,
        max_size=20,
    )
)
def test_a_trace_survives_writing_and_loading(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, int, int, int]]
) -> None:
    arrivals, prompts, outputs, priorities = zip(*rows, strict=True)
    first = min(arrivals)
    trace = make_trace(
        "any",
        arrival_s=[when - first for when in arrivals],
        num_prompt_tokens=prompts,
        num_output_tokens=outputs,
        scheduling_priority=priorities,
        prefix_hashes=[range(prompt % 5 if prompt > 80 else 0) for prompt in prompts],
        client_ids=[f"client {prompt}" for prompt in prompts],
    )
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    write_trace(trace, path)
    again = load_trace(path)
    for name in ("arrival_s", "num_prompt_tokens", "num_output_tokens", "scheduling_priority"):
        assert getattr(again, name).tolist() == getattr(trace, name).tolist()
    assert again.prefix_hashes == trace.prefix_hashes
    assert again.client_ids == trace.client_ids


def test_the_chrome_trace_follows_a_request_to_where_it_moved(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_chrome_trace(make_result(), path)
    content = json.loads(path.read_text())
    assert content["otherData"] == {
        "policy": "latency",
        "trace": "four",
        "requests": "4 of 4",
    }
    slices = [
        (event["name"], event["pid"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in content["traceEvents"]
        if event["ph"] == "X" and event["name"].startswith("0 ")
    ]
    assert slices == [
        ("0 queued", 0, 0.0, 0.5),
        ("0 prefill", 0, 0.5, 1.0),
        ("0 decode", 0, 1.0, 2.0),
        ("0 decode", 1, 2.0, 3.0),
    ]
    arrows = [(e["ph"], e["pid"], e["id"]) for e in content["traceEvents"] if e["ph"] in "sf"]
    assert sorted(arrows) == [("f", 1, "m-committed"), ("s", 0, "m-committed")]
    counters = [e for e in content["traceEvents"] if e["ph"] == "C" and e["name"] == "KV blocks"]
    assert counters[0]["args"] == {"used": 50, "reserved": 10}


def test_requests_on_a_lane_do_not_overlap(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_chrome_trace(make_result(), path)
    lanes: dict[tuple[int, int], float] = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["ph"] == "X":
            lane = (event["pid"], event["tid"])
            assert event["ts"] >= lanes.get(lane, 0.0)
            lanes[lane] = event["ts"] + event["dur"]


def test_requests_beyond_the_limit_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_chrome_trace(make_result(), path, max_requests=1)
    content = json.loads(path.read_text())
    assert content["otherData"]["requests"] == "1 of 4"
    assert all(e["name"].startswith("0 ") for e in content["traceEvents"] if e["ph"] == "X")


def test_a_curve_ends_at_the_greatest_value() -> None:
    values, shares = quantile_curve(np.arange(1001, dtype=np.float64), num_points=11)
    assert (values[0], values[-1], shares[0], shares[-1]) == (0.0, 1000.0, 0.0, 1.0)
    assert values == sorted(values)
    assert quantile_curve(np.array([np.nan])) == ([], [])
