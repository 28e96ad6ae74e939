"""``llumsched migrate`` asks once, and says how it went."""

from __future__ import annotations

import pytest

from llumsched import cli
from tests.commands.stub import Answer, error, make_report, serving

PATH = "/llumsched/migrations"


def test_a_migration_is_told_in_three_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with serving({PATH: (200, make_report())}) as stub:
        assert cli.main(["migrate", "chatcmpl-1", "--to", "instance-1", "--url", stub.url]) == 0
    assert stub.bodies == [{"request_id": "chatcmpl-1", "destination": "instance-1"}]
    assert capsys.readouterr().out.splitlines() == [
        "moved chatcmpl-1 from instance-0 to instance-1 after 61 tokens of output",
        "context of 1201 tokens: 38 KV blocks (28.0 MB) copied in 3 stages by shared memory",
        "suspended for 38 ms, where one decode step takes 31 ms; 212 ms in all",
    ]


def test_without_a_destination_the_scheduler_chooses(capsys: pytest.CaptureFixture[str]) -> None:
    report = make_report(num_blocks=1, num_bytes=737_280, num_cached_blocks=37, num_stages=1)
    with serving({PATH: (200, report)}) as stub:
        assert cli.main(["migrate", "chatcmpl-1", "--url", stub.url]) == 0
    assert stub.bodies == [{"request_id": "chatcmpl-1", "destination": None}]
    out = capsys.readouterr().out
    assert ": 1 KV block (0.7 MB) copied in 1 stage by shared memory, 37 already there" in out


def test_an_idle_session_is_told_in_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with serving({PATH: (200, make_report(has_ended=True))}) as stub:
        assert cli.main(["migrate", "--session", "s", "--url", stub.url]) == 0
    assert stub.bodies == [{"session_id": "s", "destination": None}]
    moved, copied = capsys.readouterr().out.splitlines()
    assert moved.startswith("moved the KV of chatcmpl-1, which has ended, from instance-0 to")
    assert copied.startswith("context of 1201 tokens")


@pytest.mark.parametrize("argv", [["migrate"], ["migrate", "r", "--session", "s"]])
def test_a_request_or_a_session(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(argv)
    assert "--session" in capsys.readouterr().err


@pytest.mark.parametrize(
    "refusal",
    [
        error(404, "No unfinished request 'x'. GET /llumsched/requests lists them."),
        error(409, "Not migrated: no other instance can receive a migration now."),
        error(503, "The global scheduler did not answer within 120 s."),
    ],
)
def test_a_refusal_is_the_servers_own_sentence(
    refusal: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving({PATH: refusal}) as stub:
        assert cli.main(["migrate", "x", "--url", stub.url]) == 1
    assert isinstance(refusal[1], dict)
    said = refusal[1]["error"]["message"]
    assert capsys.readouterr().err == f"llumsched: {said}\n"
    assert len(stub.bodies) == 1, "a migration is never asked for twice"
