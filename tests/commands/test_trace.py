"""``llumsched trace`` says in order what became of a request."""

from __future__ import annotations

import json

import pytest

from llumsched import cli
from tests.commands.stub import serving

STEPS = [
    {
        "at_s": 1000.0,
        "kind": "arrived",
        "text": "120 prompt tokens",
        "instance_id": None,
        "migration_id": None,
        "candidates": [],
    },
    {
        "at_s": 1000.002,
        "kind": "dispatched",
        "text": "freeness=30.0",
        "instance_id": "instance-1",
        "migration_id": None,
        "candidates": [
            {
                "instance_id": "instance-1",
                "num_free_blocks": 60,
                "num_total_blocks": 63,
                "num_running": 2,
                "num_waiting": 0,
                "score": 30.0,
            }
        ],
        "scored_by": "freeness",
    },
    {
        "at_s": 1003.5,
        "kind": "migration ended",
        "text": "committed at instance-0: 3 stages",
        "instance_id": "instance-1",
        "migration_id": "m7",
        "candidates": [],
    },
]
ANSWER = {"requests": {"cmpl-1-0": STEPS}}
PATH = "/llumsched/requests/cmpl-1/trace"


def test_the_steps_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    with serving({PATH: (200, ANSWER)}) as stub:
        assert cli.main(["trace", "cmpl-1", "--url", stub.url]) == 0
    request_id, arrived, *rest = capsys.readouterr().out.splitlines()
    assert request_id == "cmpl-1-0"
    assert arrived.endswith("arrived: 120 prompt tokens")
    assert rest == [
        "  +    0.002 s  dispatched instance-1: freeness=30.0",
        "                instance-1: 60 of 63 blocks free, 2 running, 0 waiting; freeness: 30",
        "  +    3.500 s  migration ended m7 instance-1: committed at instance-0: 3 stages",
    ]


def test_json_is_what_the_server_said(capsys: pytest.CaptureFixture[str]) -> None:
    with serving({PATH: (200, ANSWER)}) as stub:
        assert cli.main(["trace", "cmpl-1", "--url", stub.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ANSWER


def test_a_request_that_nobody_remembers(capsys: pytest.CaptureFixture[str]) -> None:
    said = "The scheduler remembers no request 'cmpl-1'."
    error = {"error": {"message": said, "type": "NotFoundError", "param": None, "code": 404}}
    with serving({PATH: (404, error)}) as stub:
        assert cli.main(["trace", "cmpl-1", "--url", stub.url]) == 1
    assert capsys.readouterr().err == f"llumsched: {said}\n"
