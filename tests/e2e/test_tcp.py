"""Between instances that share no memory KV goes through a socket. The server ends by Ctrl-C."""

from __future__ import annotations

import signal

import pytest

from tests.e2e.cases import COMPLETIONS, SINGLE, completion
from tests.e2e.client import Admin, differences
from tests.e2e.moving import Mover
from tests.e2e.plain import PlainAnswers
from tests.e2e.servers import END_TIMEOUT_S, Server


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


def test_control_c_ends_every_process(server_apart: Server, model: str) -> None:
    """In the middle of an answer, whose client is told. Keep this test last: there is no server
    after it."""
    client = Admin(server_apart.url, model)
    with client.stream(COMPLETIONS, completion(max_tokens=400)) as stream:
        next(stream)
        before = server_apart.processes()
        assert sum(name.startswith("ray::Instance") for name in before.values()) == 2
        ending = server_apart.end(signal.SIGINT, times=2)
        *_, last = stream
    client.close()
    assert not ending.left, f"left after {END_TIMEOUT_S:.0f} s: {ending.left}"
    assert ending.status == 0
    assert last["error"]["message"] == "The server is stopping."
