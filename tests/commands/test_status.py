"""``llumsched status`` shows what the admin API answers, and needs neither vLLM nor Ray."""

from __future__ import annotations

import json

import pytest

from llumsched import cli
from llumsched.commands import CommandError
from llumsched.commands._admin import AdminClient
from llumsched.commands._totals import look, rates
from tests.commands.stub import make_berth, make_instance, make_load, serving

BUSY = make_instance(
    "instance-0",
    make_load(
        num_free_blocks=20, num_reserved_blocks=8, num_running=4, num_waiting=1, step_time_s=0.0312
    ),
    freeness=5.04,
)
CLUSTER = {
    "policy": "latency",
    "instances": [BUSY, make_instance("instance-1", make_load())],
    "migrations": {"refused": 1, "committed": 3},
    "berths": [make_berth("instance-0"), make_berth("instance-1")],
    "frontends": [],
}
REQUESTS = {
    "requests": [
        {
            "request_id": "chatcmpl-b",
            "external_id": "chatcmpl-b",
            "instance_id": "instance-1",
            "num_output_tokens": 7,
            "num_moves": 1,
        },
        {
            "request_id": "chatcmpl-a",
            "external_id": "chatcmpl-a",
            "instance_id": None,
            "num_output_tokens": 0,
            "num_moves": 0,
        },
    ]
}


def answers(
    cluster: object = CLUSTER, requests: object = REQUESTS
) -> dict[str, tuple[int, object]]:
    return {"/llumsched/instances": (200, cluster), "/llumsched/requests": (200, requests)}


def test_a_pool_without_an_instance_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    empty = CLUSTER | {"instances": [], "migrations": {}, "berths": []}
    with serving(answers(empty, {"requests": []})) as stub:
        assert cli.main(["status", "--url", stub.url]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "policy latency; migrations: none yet",
        "requests: 0 running, 0 waiting",
        "",
        "no instance serves",
        "",
        "no unfinished request",
    ]


def test_instances_and_requests_are_two_tables(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(answers()) as stub:
        assert cli.main(["status", "--url", stub.url]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "policy latency; migrations: 3 committed, 1 refused",
        "requests: 4 running, 1 waiting; KV cache: 34% of 126 blocks",
        "",
        "instance    state    freeness  blocks   KV  reserved  running  waiting   step  report",
        "instance-0  serving       5.0   35/63  56%         8        4        1  31 ms   0.1 s",
        "instance-1  serving       inf    0/63   0%         0        0        0      -   0.1 s",
        "",
        "request     instance        tokens  moves",
        "chatcmpl-a  not placed yet       0      0",
        "chatcmpl-b  instance-1           7      1",
    ]


def test_instances_that_no_request_can_leave(capsys: pytest.CaptureFixture[str]) -> None:
    stuck = BUSY | {"cannot_migrate": "speculative decoding is on"}
    with serving(answers(CLUSTER | {"instances": [stuck]})) as stub:
        assert cli.main(["status", "--url", stub.url]) == 0
    said = "instance-0: no request can leave or reach it: speculative decoding is on"
    assert said in capsys.readouterr().out.splitlines()


def test_an_idle_pool_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = CLUSTER | {"instances": [], "migrations": {}, "berths": []}
    with serving(answers(cluster, {"requests": []})) as stub:
        assert cli.main(["status", "--url", stub.url]) == 0
    printed = capsys.readouterr().out
    assert "migrations: none yet" in printed
    assert "no unfinished request" in printed


def test_an_instance_that_drains_or_has_not_reported_has_a_row(
    capsys: pytest.CaptureFixture[str],
) -> None:
    instances = [
        make_instance("instance-0", make_load(num_running=1), state="draining"),
        make_instance("instance-1", None, state="booting", report_age_s=None),
    ]
    with serving(answers(CLUSTER | {"instances": instances})) as stub:
        assert cli.main(["status", "--url", stub.url]) == 0
    draining, booting = capsys.readouterr().out.splitlines()[4:6]
    assert draining.split()[:3] == ["instance-0", "draining", "-inf"]
    assert booting.split() == ["instance-1", "booting", *["-"] * 8]


def test_json_is_what_the_server_said(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(answers()) as stub:
        assert cli.main(["status", "--url", stub.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == CLUSTER | REQUESTS


def test_the_url_of_the_openai_api_will_do(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(answers()) as stub:
        assert cli.main(["status", "--url", f"{stub.url}/v1/"]) == 0
    assert "instance-0" in capsys.readouterr().out


def test_a_crash_loop_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    crashing = make_berth(
        "instance-4",
        state="backing off",
        pid=None,
        num_deaths=5,
        last_failure="out of memory",
        retry_in_s=15.6,
    )
    booting = make_berth("instance-5", state="booting", pid=None)
    with serving(answers(CLUSTER | {"berths": [crashing, booting]})) as stub:
        assert cli.main(["status", "--url", stub.url]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "instance-4: 5 died in this place (out of memory); another is started in 16 s" in printed
    assert "instance-5: booting" in printed


def test_the_machines_of_instances_are_seen_if_there_are_several(
    capsys: pytest.CaptureFixture[str],
) -> None:
    far = make_berth("instance-1", node="10.0.0.2")
    near, booting = make_berth("instance-0"), make_berth("instance-2", state="booting", node=None)
    for berths, lines in (
        ([near, far], ["instance-0: on 10.0.0.1", "instance-1: on 10.0.0.2"]),
        ([near, booting], ["instance-2: booting"]),
    ):
        with serving(answers(CLUSTER | {"berths": berths})) as stub:
            assert cli.main(["status", "--url", stub.url]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in printed if line.startswith("instance-") and ": " in line] == lines


def test_frontends_that_have_died_are_seen(capsys: pytest.CaptureFixture[str]) -> None:
    serving_one = {
        "frontend_id": "frontend-0",
        "pid": 1,
        "state": "serving",
        "num_deaths": 0,
        "last_failure": "",
    }
    dead = serving_one | {
        "frontend_id": "frontend-1",
        "state": "backing off",
        "num_deaths": 2,
        "last_failure": "killed",
    }
    with serving(answers(CLUSTER | {"frontends": [serving_one, dead]})) as stub:
        assert cli.main(["status", "--url", stub.url]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "frontend-1: backing off; 2 died in this place (killed)" in printed
    assert not any(line.startswith("frontend-0") for line in printed)


COUNTING = CLUSTER | {
    "queued": {"normal": 2, "high": 1},
    "policy_failures": {"Mine": 12, "Fine": 0},
    "num_finished_requests": 10,
    "num_output_tokens": 1000,
    "config_file": "auto.yaml",
}


def test_what_waits_at_the_scheduler_fails_and_is_configured_is_seen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(answers(COUNTING)) as stub:
        assert cli.main(["status", "--url", stub.url]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "policy latency as auto.yaml has it; migrations: 3 committed, 1 refused",
        (
            "requests: 4 running, 1 waiting, 3 held by the scheduler (1 high, 2 normal);"
            " KV cache: 34% of 126 blocks"
        ),
        "FAILED POLICIES: Mine 12 times; the server's log says how",
    ]


def test_rates_are_those_between_two_looks() -> None:
    running = [{"num_output_tokens": 20}, {"num_output_tokens": 40}]
    before = look(COUNTING, running, at_s=5.0)
    later = COUNTING | {"num_finished_requests": 14, "num_output_tokens": 1100}
    assert rates(before, look(later, running[:1], at_s=7.0)) == "2.0 requests/s, 30 tokens/s"
    assert rates(before, look(COUNTING, [], at_s=7.0)) == "0.0 requests/s, 0 tokens/s"
    assert rates(None, before) == ""
    assert rates(before, before) == ""
    assert look(CLUSTER, running, at_s=5.0) is None


def test_watching_goes_on_while_the_server_is_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([COUNTING, CommandError("no server at http://x"), COUNTING])

    def instances(_client: AdminClient) -> object:
        found = next(looks, KeyboardInterrupt())
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr(AdminClient, "instances", instances)
    monkeypatch.setattr(AdminClient, "requests", lambda _client: REQUESTS["requests"])
    assert cli.main(["status", "--watch", "0.1"]) == 130
    printed = capsys.readouterr().out
    assert printed.count("policy latency") == 2
    assert "no server at http://x" in printed
    assert "\x1b" not in printed, "not a terminal"


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon", "inf"])
def test_an_interval_that_is_none(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["status", f"--watch={seconds}"])
    assert "a number of seconds" in capsys.readouterr().err
