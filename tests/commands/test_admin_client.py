"""Whatever a server does instead of answering, the user reads one sentence with the fix."""

from __future__ import annotations

import socket
import threading

import pytest

from llumsched import cli
from llumsched.commands import CommandError, _admin
from llumsched.commands._admin import AdminClient
from tests.commands.stub import Answer, serving


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_no_server_is_one_line_with_the_fix(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert cli.main(["status", "--url", url]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"llumsched: no server at {url} (Connection refused): start one with")
    assert said.count("\n") == 1


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "8000"])
def test_an_address_that_is_none_is_named(url: str) -> None:
    with pytest.raises(CommandError, match="give the whole address"):
        AdminClient(url)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((404, {"detail": "Not Found"}), "has no admin API"),
        ((404, {"error": {"message": "Not Found"}}), "has no admin API"),
        ((200, b"<html>hello</html>"), "has no admin API"),
        ((200, []), "has no admin API"),
        ((500, b"oh no"), "answered 500 Internal Server Error"),
        ((401, {"error": "Unauthorized"}), "wants an API key: give --api-key, or set VLLM_API_KEY"),
    ],
)
def test_another_server_is_told_apart(answer: Answer, said: str) -> None:
    with (
        serving({"/llumsched/instances": answer}) as stub,
        pytest.raises(CommandError, match=said),
    ):
        AdminClient(stub.url).instances()


def test_a_server_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_admin, "STATUS_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(CommandError, match="did not answer within 0 s"):
            AdminClient(url).instances()


def test_a_server_that_hangs_up_is_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.recv(4096)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(CommandError, match="no server at"):
            AdminClient(url).instances()
        thread.join()


def test_a_proxy_for_the_internet_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    with serving({"/llumsched/requests": (200, {"requests": []})}) as stub:
        assert AdminClient(stub.url).requests() == []


# ---- API keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "variable", "sent"),
    [
        (None, None, None),
        ("key", None, "Bearer key"),
        (None, "hidden", "Bearer hidden"),
        ("key", "hidden", "Bearer key"),
    ],
)
def test_the_key_of_flag_or_environment_is_sent(
    monkeypatch: pytest.MonkeyPatch, flag: str | None, variable: str | None, sent: str | None
) -> None:
    if variable is not None:
        monkeypatch.setenv("VLLM_API_KEY", variable)
    with serving({"/llumsched/requests": (200, {"requests": []})}) as stub:
        AdminClient(stub.url, flag).requests()
    assert stub.authorizations == [sent]


@pytest.mark.parametrize("argv", [["status"], ["scale", "3"], ["drain", "a"], ["migrate", "r"]])
def test_every_command_takes_a_key(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    with serving({}) as stub:
        for path in ("instances", "instances/a/drain", "scale", "migrations"):
            stub.answers[f"/llumsched/{path}"] = (401, {"error": "Unauthorized"})
        assert cli.main([*argv, "--url", stub.url, "--api-key", "wrong"]) == 1
    assert stub.authorizations == ["Bearer wrong"]
    said = capsys.readouterr().err
    assert said == f"llumsched: {stub.url} does not take this API key\n"


def test_a_key_does_not_go_where_a_redirect_leads() -> None:
    with (
        serving({"/llumsched/requests": (200, {"requests": []})}) as other,
        serving({"/llumsched/requests": (302, b"")}) as stub,
    ):
        stub.headers["Location"] = f"{other.url}/llumsched/requests"
        AdminClient(stub.url, "key").requests()
    assert stub.authorizations == ["Bearer key"]
    assert other.authorizations == [None]
