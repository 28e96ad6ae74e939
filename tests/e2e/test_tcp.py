"""Between instances that share no memory KV goes through a socket. The server has an API key, and
ends by Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from scripts.server_process import END_TIMEOUT_S, server_environment
from tests.e2e.cases import COMPLETIONS, SINGLE, completion
from tests.e2e.client import Admin, differences
from tests.e2e.moving import Mover
from tests.e2e.plain import PlainAnswers
from tests.e2e.servers import API_KEY, OFFLINE, Server


@pytest.mark.parametrize("name", ["penalties, seeded", "chat with logprobs"])
def test_there_and_back_again(pool_apart: Admin, plain: PlainAnswers, name: str) -> None:
    mover = Mover(pool_apart, at=(2, 12))
    found = pool_apart.whole(*SINGLE[name], on_chunk=mover)
    assert [report["transport"] for report in mover.reports] == ["tcp", "tcp"]
    assert not differences(found.as_dict(), plain.streamed[name].as_dict())


def test_long_prompt(pool_apart: Admin) -> None:
    """Many blocks: the ring of slots is used more than once."""
    body = completion(prompt=[504 + i % 997 for i in range(700)])
    expected = pool_apart.whole(COMPLETIONS, body)
    mover = Mover(pool_apart, at=(2, 12))
    found = pool_apart.whole(COMPLETIONS, body, on_chunk=mover)
    assert [report["transport"] for report in mover.reports] == ["tcp", "tcp"]
    assert not differences(found.choices, expected.choices)


def test_without_the_key_nothing_is_to_be_had(pool_apart: Admin, server_apart: Server) -> None:
    for api_key in (None, "another"):
        stranger = Admin(server_apart.url, pool_apart.model, api_key)
        for path in ("/llumsched/instances", "/llumsched/requests", "/v1/models"):
            assert stranger.get(path).status == 401, path
        for path, body in (
            ("/llumsched/scale", {"num_instances": 0}),
            ("/llumsched/instances/instance-0/drain", {}),
            ("/llumsched/migrations", {"request_id": "x"}),
            (COMPLETIONS, completion()),
            ("/invocations", completion()),
            ("/tokenize", {"prompt": "x"}),
        ):
            assert stranger.post(path, body).status == 401, path
        assert stranger.get("/health").status == 200
        assert "llumsched_scheduler_up" in stranger.text("/metrics")
        stranger.close()


def test_status_takes_the_key(server_apart: Server) -> None:
    command = [sys.executable, "-m", "llumsched", "status", f"--url={server_apart.url}"]

    def ask(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = server_environment(**OFFLINE, **variables)
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    assert "wants an API key" in ask().stderr
    assert "instance-1" in ask(VLLM_API_KEY=API_KEY).stdout


def test_control_c_ends_every_process(server_apart: Server, model: str) -> None:
    """In the middle of an answer, whose client is told. Keep this test last: there is no server
    after it."""
    client = Admin(server_apart.url, model, API_KEY)
    with client.stream(COMPLETIONS, completion(max_tokens=400)) as stream:
        next(stream)
        before = server_apart.processes()
        assert sum(name.startswith("ray::Instance") for name in before.values()) == 2
        ending = server_apart.end(signal.SIGINT, times=2)
        *_, last = stream
    client.close()
    assert not ending.killed, f"left after {END_TIMEOUT_S:.0f} s: {ending.killed}"
    assert ending.status == 0
    assert last["error"]["message"] == "The server is stopping."
