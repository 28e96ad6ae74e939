"""Whatever a server does instead of answering, the user reads one sentence with the fix."""

from __future__ import annotations

import socket
import threading

import pytest

from llumsched import cli
from llumsched.commands import CommandError, _admin
from llumsched.commands._admin import AdminClient
from tests.commands.stub import Answer, serving


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
        ((401, {"error": "Unauthorized"}), "answered 401 Unauthorized"),
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
