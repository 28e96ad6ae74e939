"""The endpoint that does the work, over HTTP: send a line, ask how much room there is.

Nothing here knows a database. An answer is judged by its status alone: what a server can mend by
itself is worth another try, what the line is to blame for is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp

from llumsched.batch.pacing import Room, room_of

ROOM_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 5.0
PRIORITY = "low"
_TRIED_AGAIN = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})
_HAS_NO_ROOM_PAGE = frozenset(
    {
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.METHOD_NOT_ALLOWED,
    }
)


class Away(Exception):
    """The endpoint cannot be reached: no line is to blame."""


class Unanswered(Exception):
    """A request was sent and has no whole answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer. `retry_after_s` is what the server asked for."""

    status: int
    content: bytes
    request_id: str
    retry_after_s: float | None = None

    @property
    def is_success(self) -> bool:
        return self.status < HTTPStatus.BAD_REQUEST

    @property
    def is_worth_another_try(self) -> bool:
        return self.status >= HTTPStatus.INTERNAL_SERVER_ERROR or self.status in _TRIED_AGAIN


class Endpoint:
    """Args:
    url: of the endpoint, without `/v1`.
    api_key: one of its keys, if it has any.
    timeout_s: for a whole answer.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 3600.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        self.session = aiohttp.ClientSession(connector=connector, timeout=timeout)

    async def close(self) -> None:
        """Close all connections."""
        await self.session.close()

    async def send(self, path: str, body: Mapping[str, Any], name: str, client: str) -> Answer:
        """Have the request done as bulk work.

        Args:
            name: of the request, for logs and traces.
            client: whose turn it takes.

        Raises:
            Away: nobody listens there.
            Unanswered: the connection broke, or the time was over.
        """
        headers = {
            **self._headers,
            "Content-Type": "application/json",
            "X-Request-Priority": PRIORITY,
            "X-Request-Id": name,
            "X-Client-Id": client,
        }
        try:
            async with self.session.post(
                self.url + path, data=json.dumps(body), headers=headers
            ) as response:
                content = await response.read()
                return Answer(
                    status=response.status,
                    content=content,
                    request_id=response.headers.get("X-Request-Id", name),
                    retry_after_s=_seconds(response.headers.get("Retry-After")),
                )
        except aiohttp.ClientConnectorError as error:
            raise Away(str(error)) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unanswered(str(error) or type(error).__name__) from error

    async def room(self) -> Room | None:
        """How much room there is; None from an endpoint that does not say.

        Raises:
            Away: the endpoint cannot be asked now.
        """
        answer = await self.describe()
        if answer is None:
            return None
        try:
            return room_of(answer)
        except (KeyError, TypeError, ValueError):
            return None

    async def describe(self) -> dict[str, Any] | None:
        """The answer of `GET /llumsched/instances`; None from an endpoint that has none.

        Raises:
            Away: the endpoint cannot be asked now.
        """
        return await self._call("GET", "/llumsched/instances")

    async def scale(self, num_instances: int) -> bool:
        """Begin to have this many instances; False where the endpoint cannot.

        Raises:
            Away: the endpoint cannot be asked now, or refuses.
        """
        body = {"num_instances": num_instances}
        return await self._call("POST", "/llumsched/scale", body) is not None

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any] | None:
        timeout = aiohttp.ClientTimeout(total=ROOM_TIMEOUT_S)
        url = self.url + path
        try:
            async with self.session.request(
                method, url, json=body, headers=self._headers, timeout=timeout
            ) as response:
                if response.status in _HAS_NO_ROOM_PAGE:
                    return None
                if response.status >= HTTPStatus.BAD_REQUEST:
                    said = (await response.text())[:500]
                    raise Away(f"{url} answers {response.status}: {said}")
                answer = await response.json(content_type=None)
                return answer if isinstance(answer, dict) else None
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise Away(f"{url}: {str(error) or type(error).__name__}") from error


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else max(0.0, float(text))
    except ValueError:
        return None
