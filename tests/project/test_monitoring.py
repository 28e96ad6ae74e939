"""Boards and alert rules ask for metrics that exist, with labels that they have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llumsched.metrics import CATALOGUE
from scripts import grafana_boards
from tests.wheels import ROOT

ALERTS = ROOT / "configs" / "prometheus" / "alerts.yaml"
SCRAPE = ROOT / "configs" / "prometheus" / "scrape.yaml"
SPECS = {spec.exposed_name: spec for spec in CATALOGUE} | {
    f"{spec.name}_{part}": spec
    for spec in CATALOGUE
    if spec.kind == "histogram"
    for part in ("bucket", "sum", "count")
}
# Of vLLM's, those that boards show; each has the label `engine`.
VLLM = {
    "vllm:num_preemptions_total",
    "vllm:time_to_first_token_seconds_bucket",
}
NAME = re.compile(r"(?:llumsched_|vllm:)[a-z_]+")
WITH_LABELS = re.compile(r"(?P<name>(?:llumsched_|vllm:)[a-z_]+)\{(?P<labels>[^}]*)\}")
GROUPED = re.compile(r"by \((?P<labels>[^)]*)\)\s*\((?P<rest>.*)", re.DOTALL)


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> Iterator[tuple[str, str]]:
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for name in grafana_boards.BOARDS:
        board = json.loads((grafana_boards.FOLDER / f"{name}.json").read_text())
        for panel in board["panels"]:
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}", target["expr"]


def labels_of(name: str) -> set[str]:
    if name in VLLM:
        return {"engine", "le"}
    spec = SPECS[name]
    return {*spec.labels, *({"le"} if spec.kind == "histogram" else ())}


@pytest.mark.parametrize(("where", "query"), queries())
def test_a_query_is_about_metrics_and_labels_that_there_are(where: str, query: str) -> None:
    names = set(NAME.findall(query))
    assert names, where
    assert names <= SPECS.keys() | VLLM
    for match in WITH_LABELS.finditer(query):
        asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", match["labels"]))
        assert asked <= labels_of(match["name"]), match[0]
    for match in GROUPED.finditer(query):
        (name, *_) = NAME.findall(match["rest"])
        grouped = {label.strip() for label in match["labels"].split(",")}
        assert grouped <= labels_of(name), match[0]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_what_is_wrong_with_labels_that_it_has(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    said = " ".join(rule["annotations"].values())
    shown = set(re.findall(r"\$labels\.(\w+)", said))
    available: set[str] = set()
    for name in NAME.findall(rule["expr"]):
        available |= labels_of(name)
    assert shown <= available


def test_a_bound_of_a_board_is_a_bucket() -> None:
    for where, query in queries():
        for name, bound in re.findall(r'(llumsched_[a-z_]+)_bucket\{le="([\d.]+)"\}', query):
            (spec,) = (spec for spec in CATALOGUE if spec.name == name)
            assert float(bound) in spec.buckets, where


def test_the_boards_are_those_of_the_script() -> None:
    for name in grafana_boards.BOARDS:
        written = (grafana_boards.FOLDER / f"{name}.json").read_text()
        assert written == grafana_boards.written(name), "run `make docs`"
    files = {path.stem for path in grafana_boards.FOLDER.glob("*.json")}
    assert files == set(grafana_boards.BOARDS)


def lost(given: Any, kept: Any, where: str = "") -> Iterator[str]:
    """Parts of a value that are not in its copy, or are others there."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key in kept:
                yield from lost(value, kept[key], f"{where}.{key}")
            else:
                yield f"{where}.{key}"
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, (value, copy) in enumerate(zip(given, kept, strict=True)):
            yield from lost(value, copy, f"{where}[{number}]")
    elif given != kept:
        yield f"{where}: {given!r}, not {kept!r}"


@pytest.mark.parametrize("name", grafana_boards.BOARDS)
def test_grafana_s_own_model_of_a_board_loses_nothing_of_it(name: str) -> None:
    """By the types that Grafana generates from its schema: a key that it does not know is lost."""
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    board = json.loads((grafana_boards.FOLDER / f"{name}.json").read_text())
    read = models.Dashboard.from_json(board)
    assert list(lost(board, json.loads(encoder.JSONEncoder().encode(read)))) == []


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed")
@pytest.mark.parametrize(
    "command", [("check", "rules", str(ALERTS)), ("check", "config", str(SCRAPE))]
)
def test_promtool_takes_them(command: tuple[str, ...]) -> None:
    done = subprocess.run(("promtool", *command), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed")
def test_promtool_takes_every_query_of_the_boards(tmp_path: Path) -> None:
    recorded = [
        {"record": f"board:{number}", "expr": query.replace("$instance_id", ".*")}
        for number, (_, query) in enumerate(queries())
    ]
    path = tmp_path / "boards.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "boards", "rules": recorded}]}))
    done = subprocess.run(
        ("promtool", "check", "rules", str(path)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
