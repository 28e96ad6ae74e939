"""Whatever a server does instead of answering, the user reads one sentence with the fix."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Iterator

import pytest

from llumsched import cli
from llumsched.commands import CommandError, _admin
from llumsched.commands._admin import AdminClient
from scripts.server_process import free_port
from tests.commands.stub import Answer, serving


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


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


# ---- servers that are not ours, and every command ---------------------------------------------

COMMANDS = (
    ["status"],
    ["status", "--json"],
    ["migrate", "r"],
    ["drain", "instance-0"],
    ["drain", "--node", "10.0.0.1"],
    ["scale", "3"],
    ["restart"],
    ["trace", "r"],
)


def said_by(
    argv: list[str], url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """The one line that a command ends with."""
    monkeypatch.setattr(_admin, "STATUS_TIMEOUT_S", 5.0)
    assert cli.main([*argv, "--url", url]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("llumsched: "), err
    assert err.count("\n") == 1, err
    return err


@contextlib.contextmanager
def answering(context: ssl.SSLContext | None, answer: bytes = b"") -> Iterator[str]:
    """A port that sends the same to whoever comes, and hangs up; its address."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                connection = self.request
                if context is not None:
                    connection = context.wrap_socket(connection, server_side=True)
                connection.recv(65536)
                connection.sendall(answer)
                connection.close()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def html(status: str) -> bytes:
    body = f"<html><h1>{status}</h1></html>"
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """A server's side of TLS, with a certificate that nobody has signed."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_every_command_says_that_another_server_is_not_ours(
    argv: list[str],
    tls: ssl.SSLContext,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def said(url: str) -> str:
        return said_by(argv, url, capsys, monkeypatch)

    # Nothing there.
    url = f"http://127.0.0.1:{free_port()}"
    assert f"no server at {url} (Connection refused): start one with" in said(url)
    # A web server, and plain vLLM, whose answers are JSON.
    with answering(None, html("404 Not Found")) as address:
        assert "has no admin API: it is not llumsched, or" in said(f"http://{address}")
    with answering(None, html("200 OK")) as address:
        assert "has no admin API: it is not llumsched, or" in said(f"http://{address}")
    with serving({}) as stub:
        assert "has no admin API: it is not llumsched, or" in said(stub.url)
        # TLS where there is none.
        address = stub.url.removeprefix("http://")
        expected = f"https://{address} does not speak TLS: try --url http://{address}"
        assert expected in said(f"https://{address}")
    # None where there is TLS, and a certificate of nobody.
    with answering(tls) as address:
        assert f"try --url https://{address}" in said(f"http://{address}")
        assert "not trusted (self-signed certificate): set SSL_CERT_FILE" in said(
            f"https://{address}"
        )
    # No web server at all.
    with answering(None, b"220 mail.example ESMTP\r\n") as address:
        assert "does not speak HTTP" in said(f"http://{address}")


def test_a_server_that_hangs_up_does_not_speak_http() -> None:
    with (
        answering(None) as address,
        pytest.raises(CommandError, match=r"does not speak HTTP \(Remote end closed"),
    ):
        AdminClient(f"http://{address}").instances()


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
