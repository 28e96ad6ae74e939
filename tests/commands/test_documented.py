"""The operators' commands of the docs, run as they stand there, against a server that answers."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from llumsched import cli
from tests.commands.stub import make_berth, make_instance, make_load, make_report, serving
from tests.project.test_docs import PAGES, commands_of

OF_OPERATORS = ("status", "trace", "migrate", "drain", "scale", "restart")
INSTANCES = ("instance-0", "instance-1")
CLUSTER: dict[str, Any] = {
    "policy": "adaptive",
    "config_file": None,
    "scheduler_age_s": 60.0,
    "instances": [make_instance(name, make_load()) for name in INSTANCES],
    "migrations": {},
    "queued": {},
    "policy_failures": {},
    "num_finished_requests": 0,
    "num_output_tokens": 0,
    # What is drained has ended by the time that somebody looks.
    "berths": [make_berth(f"instance-{number}") for number in (7, 8, 9)],
    "frontends": [],
}
STEP = {
    "at_s": 1000.0,
    "kind": "arrived",
    "text": "120 prompt tokens",
    "instance_id": None,
    "migration_id": None,
    "candidates": [],
}
ANSWERS: dict[str, Any] = {
    "/llumsched/instances": CLUSTER,
    "/llumsched/requests": {"requests": []},
    "/llumsched/requests/REQUEST_ID/trace": {"requests": {"cmpl-1-0": [STEP]}},
    "/llumsched/migrations": make_report(),
    "/llumsched/scale": {"num_instances": 3},
    **{f"/llumsched/instances/{name}/drain": {} for name in (*INSTANCES, "INSTANCE")},
}
COMMANDS = sorted(
    command
    for page in PAGES
    for command in set(commands_of(page))
    if command.split()[1] in OF_OPERATORS and "--watch" not in command
)


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_it_does_what_the_page_says(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving({path: (200, answer) for path, answer in ANSWERS.items()}) as stub:
        assert cli.main([*shlex.split(command)[1:], "--url", stub.url]) == 0
    assert capsys.readouterr().out


def test_the_docs_show_each_of_them() -> None:
    assert {command.split()[1] for command in COMMANDS} == set(OF_OPERATORS)
