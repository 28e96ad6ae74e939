"""LoRA adapters of plain servers: loaded while they run, and unloaded by use where room is limited.

An adapter is a model as any other: requests for it go to the servers that list it. One that has
been loaded through the proxy is remembered: when no server has it any more (it made room for
another, or its server was started anew), the next request for it loads it at one server.

Invariant: an adapter with requests at a server is not unloaded there to make room.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp
from aiohttp import web

from llumsched.batch.bodies import json_object
from llumsched.proxy.errors import error_response
from llumsched.proxy.fleet import Fleet
from llumsched.proxy.server import PlainServer

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class AdapterError(Exception):
    """An adapter cannot be loaded or unloaded; the message is for the client."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapter:
    name: str
    base_model: str
    order: Mapping[str, Any]
    """The body by which a server loads it."""


class Adapters:
    """See the module docstring.

    Args:
        session: for orders to the servers, which may take long.
    """

    def __init__(self, fleet: Fleet, session: aiohttp.ClientSession) -> None:
        self._fleet = fleet
        self._session = session
        self._known: dict[str, _Adapter] = {}
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def names(self) -> set[str]:
        """Adapters that are loaded when somebody asks for them."""
        return set(self._known)

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Serve vLLM's two paths."""
        router.add_post(LOAD, self._load)
        router.add_post(UNLOAD, self._unload)

    async def ensure(self, name: str | None) -> None:
        """Have an adapter that is remembered loaded somewhere.

        Raises:
            AdapterError: no server loads it.
        """
        adapter = self._known.get(name or "")
        if adapter is None:
            return
        async with self._locks[adapter.name]:
            if self._having(adapter.name):
                return
            servers = self._choice(adapter)
            if not servers:
                message = f"No server of '{adapter.base_model}' is there."
                raise AdapterError(HTTPStatus.SERVICE_UNAVAILABLE, message)
            await self._load_at(servers[0], adapter)

    async def _load(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await _body(request)
            adapter, number = self._described(body)
            servers = self._choice(adapter)[:number]
            for server in servers:
                await self._load_at(server, adapter)
                self._known[adapter.name] = adapter
        except AdapterError as error:
            return error_response(error.status, str(error))
        where = ", ".join(server.server_id for server in servers)
        return web.Response(text=f"Success: LoRA adapter '{adapter.name}' is loaded at {where}.")

    async def _unload(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await _body(request)
            name = body["lora_name"]
            servers = self._having(name)
            if self._known.pop(name, None) is None and not servers:
                raise AdapterError(HTTPStatus.NOT_FOUND, f"No server has an adapter '{name}'.")
            for server in servers:
                await self._order(server, UNLOAD, body)
            self._fleet.forget_model(name)
        except AdapterError as error:
            return error_response(error.status, str(error))
        return web.Response(text=f"Success: LoRA adapter '{name}' is unloaded.")

    def _described(self, body: dict[str, Any]) -> tuple[_Adapter, int | None]:
        """The adapter that a body names, and at how many servers it is to be (`None`: all)."""
        order = {k: v for k, v in body.items() if k not in ("base_model", "num_servers")}
        number = body.get("num_servers")
        if number is not None and (not isinstance(number, int) or number < 1):
            raise AdapterError(HTTPStatus.BAD_REQUEST, "'num_servers' must be a number above 0.")
        bases = {
            model
            for server in self._fleet.servers.values()
            for model in server.models
            if server.is_there and model not in server.adapters
        }
        base = body.get("base_model") or (next(iter(bases)) if len(bases) == 1 else None)
        if base not in bases:
            message = f"'base_model' must be one of {', '.join(sorted(bases)) or 'none yet'}."
            raise AdapterError(HTTPStatus.BAD_REQUEST, message)
        return _Adapter(name=body["lora_name"], base_model=base, order=order), number

    def _choice(self, adapter: _Adapter) -> list[PlainServer]:
        """Servers that may load an adapter: those that have it first, then by room."""
        able = [
            server
            for server in self._fleet.servers.values()
            if server.is_there and not server.is_draining and adapter.base_model in server.models
        ]
        return sorted(
            able, key=lambda s: (adapter.name not in s.adapters, len(s.adapters), len(s.sent))
        )

    def _having(self, name: str) -> list[PlainServer]:
        servers = self._fleet.servers.values()
        return [s for s in servers if s.is_there and not s.is_draining and name in s.adapters]

    async def _load_at(self, server: PlainServer, adapter: _Adapter) -> None:
        async with self._locks[server.server_id]:
            if adapter.name in server.adapters and not adapter.order.get("load_inplace"):
                return
            limit = server.backend.max_adapters
            while limit and adapter.name not in server.adapters and len(server.adapters) >= limit:
                await self._order(server, UNLOAD, {"lora_name": _least_used(server)})
            await self._order(server, LOAD, adapter.order)

    async def _order(self, server: PlainServer, path: str, body: Mapping[str, Any]) -> None:
        """Have a server carry an order out, and learn what it serves now."""
        url = f"{server.backend.url}{path}"
        try:
            async with self._session.post(url, json=body, headers=server.headers) as response:
                text = await response.text(errors="replace")
            if response.status != HTTPStatus.OK:
                message = f"{server.server_id} answers {response.status}: {text[:500]}"
                is_of_client = 400 <= response.status < 500
                status = response.status if is_of_client else HTTPStatus.BAD_GATEWAY
                raise AdapterError(HTTPStatus(status), message)
            await server.ask_models()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            message = f"{server.server_id}: {str(error) or type(error).__name__}"
            raise AdapterError(HTTPStatus.BAD_GATEWAY, message) from error


def _least_used(server: PlainServer) -> str:
    """The adapter that was asked for longest ago, of those without a request.

    Raises:
        AdapterError: each has one.
    """
    busy = {sent.model for sent in server.sent.values()}
    idle = [name for name in server.adapters if name not in busy]
    if not idle:
        message = f"Each of the adapters at {server.server_id} has requests."
        raise AdapterError(HTTPStatus.SERVICE_UNAVAILABLE, message)
    return min(idle, key=lambda name: server.used_s.get(name, 0.0))


async def _body(request: web.Request) -> dict[str, Any]:
    body = await json_object(request)
    if not isinstance(body.get("lora_name"), str):
        message = 'The body must be an object with the key "lora_name".'
        raise AdapterError(HTTPStatus.BAD_REQUEST, message)
    return body
