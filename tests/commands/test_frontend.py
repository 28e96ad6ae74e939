"""`llumsched frontend`: mistakes are one sentence, and the pool's settings are its own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llumsched import cli
from llumsched.frontend import join
from llumsched.frontend.http.api_keys import num_keys
from llumsched.frontend.options.arguments import parse
from llumsched.frontend.workers.invitation import invitation_of, plan_of
from llumsched.pool.joining import Here, Invitation
from llumsched.wire.keys import PoolKeys

HOST = "127.0.0.1"
NODE = "10.0.0.2"
HERE = Here(host=NODE, node_id="this node")
KEYS = PoolKeys.generate()


@pytest.fixture(autouse=True)
def _logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "set_up", lambda *_: None)


def invitation(*flags: str, loopback_of: str | None = None) -> Invitation:
    args, options = parse(["some/model", "--frontends=2", *flags])
    cache = SimpleNamespace(prefix_caching_hash_algo="sha256")
    config: Any = SimpleNamespace(cache_config=cache)
    return invitation_of(
        args, options, config, keys=KEYS, door="tcp://door:1", loopback_of=loopback_of
    )


@pytest.mark.parametrize("address", ["local", "ray://head:10001", "head", "http://head:1"])
def test_what_is_no_address_of_a_cluster(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["frontend", "--join", address])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith(
        f"{address!r} is no address of a Ray cluster: give HOST:PORT, as 'ray start' names it, or"
        " 'auto'"
    )


def test_which_pool_must_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["frontend"])
    assert "--join" in capsys.readouterr().err


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server((HOST, 0)) as listener:
        yield listener.getsockname()[1]


def test_a_port_in_use(taken: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert join.main(invitation(), HERE, HOST, taken) == 2
    assert capsys.readouterr().err == (
        f"llumsched frontend: Cannot listen on {HOST}:{taken} (Address already in use); choose "
        "another --port.\n"
    )


def test_a_model_that_this_machine_does_not_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, options = parse([str(tmp_path / "model")])
    config: Any = None
    told = invitation_of(args, options, config, keys=KEYS, door="", loopback_of=None)
    assert join.main(told, HERE, HOST, 0) == 2
    assert "There is no model at" in capsys.readouterr().err


def test_a_key_of_tls_that_this_machine_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    told = invitation("--ssl-keyfile=/nowhere/key", "--ssl-certfile=/nowhere/cert")
    assert join.main(told, HERE, HOST, 0) == 2
    assert capsys.readouterr().err == (
        "llumsched frontend: The server was started with --ssl-keyfile /nowhere/key, which is not "
        "on this machine: put the file there.\n"
    )


@pytest.mark.parametrize("by_flag", [True, False])
def test_the_api_keys_are_the_pool_s(monkeypatch: pytest.MonkeyPatch, by_flag: bool) -> None:
    if not by_flag:
        monkeypatch.setenv("VLLM_API_KEY", "key-one")
    told = invitation(*(["--api-key", "key-one", "key-two"] if by_flag else []))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    plan = plan_of(told, NODE, host=HOST, port=8000)
    assert plan.args.api_key == (["key-one", "key-two"] if by_flag else ["key-one"])
    assert num_keys(plan.args) == (2 if by_flag else 1)
    assert "key-one" not in str({**told, "plan": ""})
    assert plan.keys == KEYS


def test_it_is_one_frontend_at_its_own_address() -> None:
    plan = plan_of(invitation("--port=8123"), NODE, host="0.0.0.0", port=9000)
    assert (plan.args.host, plan.args.port, plan.host) == ("0.0.0.0", 9000, NODE)
    assert plan.options.num_frontends == 1
    told = invitation(loopback_of="this node")
    assert plan_of(told, NODE, host=HOST, port=9000).host == "127.0.0.1"


def test_operators_come_in_where_nobody_else_does() -> None:
    """As for the server itself: by where this frontend listens."""
    told = invitation()
    assert plan_of(told, NODE, host=HOST, port=9000).options.admin_api
    assert not plan_of(told, NODE, host="0.0.0.0", port=9000).options.admin_api
    told = invitation("--admin-api=on", "--host=0.0.0.0")
    assert plan_of(told, NODE, host="0.0.0.0", port=9000).options.admin_api
