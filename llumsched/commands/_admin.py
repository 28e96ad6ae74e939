"""The admin API from the outside: what the operators' commands ask a running server.

Standard library only, so that the commands work where neither vLLM nor Ray is installed. Whatever
goes wrong is one sentence that names the fix; nothing is retried, since a migration that was asked
for twice might happen twice.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from llumsched.access import API_KEY_VARIABLE
from llumsched.commands import CommandError
from llumsched.flags import server_url

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
STATUS_TIMEOUT_S = 10.0
# The server itself gives a migration up after two minutes.
MIGRATE_TIMEOUT_S = 150.0
MOST_SAID = 1000


def add_server(parser: argparse.ArgumentParser) -> None:
    """The options that all these commands share."""
    parser.add_argument(
        "--url", default=DEFAULT_URL, metavar="URL", help="the server; default: %(default)s"
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"one of the server's API keys, if it has any; default: {API_KEY_VARIABLE} of the"
        " environment, which other users of this machine cannot see",
    )


class AdminClient:
    """Calls to ``URL/llumsched/...``; every method raises ``CommandError`` when it fails."""

    def __init__(self, url: str = DEFAULT_URL, api_key: str | None = None) -> None:
        self._api_key = api_key or os.environ.get(API_KEY_VARIABLE)
        try:
            self.url = server_url(url)
        except argparse.ArgumentTypeError as error:
            raise CommandError(f"--url {error}") from None
        # A proxy for the way out to the internet does not lead to a server on loopback.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @classmethod
    def of(cls, args: argparse.Namespace) -> AdminClient:
        """The client that the options of ``add_server`` ask for."""
        return cls(args.url, args.api_key)

    def instances(self) -> dict[str, Any]:
        """``GET /llumsched/instances``: the policy, every instance, and migrations by outcome."""
        return self.call("/llumsched/instances", timeout_s=STATUS_TIMEOUT_S)

    def requests(self) -> list[dict[str, Any]]:
        """``GET /llumsched/requests``: every unfinished request and the instance it is on."""
        found: list[dict[str, Any]] = self.call("/llumsched/requests", timeout_s=STATUS_TIMEOUT_S)[
            "requests"
        ]
        return found

    def trace(self, request_id: str) -> dict[str, Any]:
        """``GET /llumsched/requests/ID/trace``: what became of a request, step by step."""
        path = f"/llumsched/requests/{urllib.parse.quote(request_id, safe='')}/trace"
        return self.call(path, timeout_s=STATUS_TIMEOUT_S)

    def live(self) -> Iterator[dict[str, Any]]:
        """``GET /llumsched/live``: frames of the pool, one a second, until the server ends."""
        path = "/llumsched/live"
        with self._open(path, timeout_s=STATUS_TIMEOUT_S, body=None) as response:
            while line := self._read(response.readline, STATUS_TIMEOUT_S):
                if line.startswith(b"data: "):
                    try:
                        frame = json.loads(line.removeprefix(b"data: "))
                    except ValueError as error:
                        raise CommandError(self._not_ours()) from error
                    yield frame
        raise CommandError(f"{self.url} has ended")

    def migrate(
        self,
        request_id: str | None,
        destination: str | None = None,
        session_id: str | None = None,
    ) -> dict[str, Any]:
        """``POST /llumsched/migrations``: move a request, or what a session has; how it went, once
        it has moved."""
        body = {"destination": destination}
        body |= {"request_id": request_id} if session_id is None else {"session_id": session_id}
        return self.call("/llumsched/migrations", body=body, timeout_s=MIGRATE_TIMEOUT_S)

    def drain(
        self, instance_id: str, *, deadline_s: float | None = None, replace: bool = False
    ) -> dict[str, Any]:
        """``POST /llumsched/instances/ID/drain``: begin to empty an instance and end it."""
        path = f"/llumsched/instances/{urllib.parse.quote(instance_id, safe='')}/drain"
        body = {"deadline_s": deadline_s, "replace": replace}
        return self.call(path, body=body, timeout_s=STATUS_TIMEOUT_S)

    def scale(self, num_instances: int) -> dict[str, Any]:
        """``POST /llumsched/scale``: begin to have this many instances."""
        body = {"num_instances": num_instances}
        return self.call("/llumsched/scale", body=body, timeout_s=STATUS_TIMEOUT_S)

    def call(
        self, path: str, *, timeout_s: float, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The answer of a path to GET, or to POST where there is a body."""
        with self._open(path, timeout_s=timeout_s, body=body) as response:
            text = self._read(response.read, timeout_s)
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise CommandError(self._not_ours()) from error
        if not isinstance(answer, dict):
            raise CommandError(self._not_ours())
        return answer

    def _open(self, path: str, *, timeout_s: float, body: Mapping[str, Any] | None) -> Any:
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        if self._api_key:
            # Not sent along to where a redirect leads.
            request.add_unredirected_header("Authorization", f"Bearer {self._api_key}")
        return self._read(lambda: self._opener.open(request, timeout=timeout_s), timeout_s)

    def _read(self, read: Callable[[], T], timeout_s: float) -> T:
        """``read()`` from the server; whatever goes wrong is a ``CommandError``."""
        try:
            return read()
        except urllib.error.HTTPError as error:
            raise CommandError(self._refusal(error)) from error
        except TimeoutError as error:
            raise CommandError(f"{self.url} did not answer within {timeout_s:.0f} s") from error
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                raise CommandError(f"{self.url} did not answer within {timeout_s:.0f} s") from error
            raise CommandError(self._no_answer(reason)) from error

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        """The server's own words for a refusal, where it said any."""
        with error:
            text = error.read(64 * 1024)
        try:
            message = json.loads(text)["error"]["message"]
        except (ValueError, LookupError, TypeError):
            message = None
        if error.code == http.client.UNAUTHORIZED:
            return (
                f"{self.url} does not take this API key"
                if self._api_key
                else f"{self.url} wants an API key: give --api-key, or set {API_KEY_VARIABLE}"
            )
        is_no_path = str(message).startswith("There is no path ")
        if error.code == http.client.NOT_FOUND and (message in (None, "Not Found") or is_no_path):
            return self._not_ours()
        return _one_line(message) if message else f"{self.url} answered {error.code} {error.reason}"

    def _no_answer(self, reason: object) -> str:
        """Why the connection led to no answer, with what may be meant instead."""
        address = self.url.partition("://")[2]
        if isinstance(reason, ssl.SSLCertVerificationError):
            return (
                f"the certificate of {self.url} is not trusted ({reason.verify_message}): set"
                " SSL_CERT_FILE to the authority that signed it"
            )
        if isinstance(reason, ssl.SSLError):
            return f"{self.url} does not speak TLS: try --url http://{address}"
        if isinstance(reason, http.client.HTTPException | ConnectionResetError):
            # So ends plain HTTP at a port for TLS, and at one that is no web server's.
            return (
                f"{self.url} does not speak HTTP ({_one_line(reason)}): if it was started with"
                f" --ssl-certfile, try --url https://{address}"
            )
        return (
            f"no server at {self.url} ({getattr(reason, 'strerror', None) or reason}): start"
            " one with 'llumsched serve', or name it with --url"
        )

    def _not_ours(self) -> str:
        return (
            f"{self.url} has no admin API: it is not llumsched, or listens beyond this machine and"
            " was not started with --admin-api on"
        )


def _one_line(said: object) -> str:
    """Words of a server, which may be anybody's."""
    return " ".join(str(said).split())[:MOST_SAID]
