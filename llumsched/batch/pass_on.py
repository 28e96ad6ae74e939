"""Requests about files and batches, passed on by a front door to the batch process behind it.

Bodies are streams in both directions; nothing is held whole. What a front door checks (its API key)
is checked before, and the client's headers go along, so the batch process sees the client's key.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus

import aiohttp

PATHS = ("/v1/files", "/v1/batches")
# Of one connection, not of the message (RFC 9110, section 7.6.1), and what is set anew.
_NOT_PASSED_ON = frozenset(
    {
        *("connection", "content-length", "expect", "host", "keep-alive", "proxy-authenticate"),
        *("proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade"),
    }
)


class BatchServerAway(Exception):
    """The batch process does not answer; the message says how it was asked."""

    status = HTTPStatus.BAD_GATEWAY


class BatchServer:
    """The batch process at `url`. A session is opened with the first request."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: AsyncIterable[bytes] | None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a request, whose content is still to be read.

        Args:
            path: with its query.

        Raises:
            BatchServerAway: there is no answer.
        """
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
            self._session = aiohttp.ClientSession(timeout=timeout, auto_decompress=False)
        try:
            response = await self._session.request(
                method, self._url + path, headers=passed_on(headers), data=body
            )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            said = str(error) or type(error).__name__
            raise BatchServerAway(f"{self._url} does not answer: {said}") from error
        async with response:
            yield response

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()


def passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers of a message without those of its connection."""
    return {name: value for name, value in headers.items() if name.lower() not in _NOT_PASSED_ON}
