"""All servers of a proxy, and the pool of each model that they serve.

A server that serves several models (a base model and its adapters, say) is in the pool of each.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence

import aiohttp

from llumsched.config import Config
from llumsched.core.load import InstanceLoad
from llumsched.proxy.backends import Backend
from llumsched.proxy.pool import ModelPool, bundle_of
from llumsched.proxy.server import PlainServer

logger = logging.getLogger(__name__)


class Fleet:
    """See the module docstring.

    Args:
        config: policy and scheduler's options of every pool.
        session: for questions to the servers.
    """

    def __init__(self, config: Config, session: aiohttp.ClientSession) -> None:
        self._config = config
        self._session = session
        self.servers: dict[str, PlainServer] = {}
        self.pools: dict[str, ModelPool] = {}
        # Each policy is there from the start, so that its first failure is an increase.
        parts = bundle_of(config).policies().values()
        self.policy_failures = Counter({type(policy).__qualname__: 0 for policy in parts})
        self._watching: dict[str, asyncio.Task[None]] = {}

    def add(self, backend: Backend) -> PlainServer:
        """Take a server in; requests go to it once it is well.

        Raises:
            ValueError: it is there already.
        """
        server = PlainServer(backend, self._session, self._changed, self._reported)
        if server.server_id in self.servers:
            raise ValueError(f"{server.server_id} is there already")
        self.servers[server.server_id] = server
        self._watching[server.server_id] = asyncio.create_task(server.watch())
        return server

    def drain(self, server_id: str, deadline_s: float | None = None) -> None:
        """Send a server nothing new; it is forgotten when it is empty, or after `deadline_s`.

        Raises:
            KeyError: there is no such server.
        """
        server = self.servers[server_id]
        server.is_draining = True
        for pool in self._pools_of(server_id):
            pool.drain(server_id, deadline_s)
        if not self._pools_of(server_id):
            self._forget(server_id)

    def replace(self, backends: Sequence[Backend]) -> None:
        """Have these servers: add those that are new, drain those that are not named any more."""
        named = {backend.url: backend for backend in backends}
        for server in list(self.servers.values()):
            if named.get(server.backend.url) == server.backend:
                del named[server.backend.url]
            elif server.backend.url in named:
                logger.warning(
                    "%s: other options count once it has been taken out and back",
                    server.server_id,
                )
                del named[server.backend.url]
            elif not server.is_draining:
                self.drain(server.server_id)
        for backend in named.values():
            try:
                self.add(backend)
            except ValueError as error:
                logger.warning("not added: %s", error)

    def forget_model(self, model: str) -> None:
        """Wait for no server of a model any more, unless there is one."""
        pool = self.pools.get(model)
        if pool is not None and not pool.server_ids and not pool.num_held_by_class:
            pool.close()
            del self.pools[model]

    async def close(self) -> None:
        """End all tasks and timers."""
        for task in self._watching.values():
            task.cancel()
        await asyncio.gather(*self._watching.values(), return_exceptions=True)
        for pool in self.pools.values():
            pool.close()

    def _changed(self, server: PlainServer) -> None:
        serving = set(server.models) if server.is_there and not server.is_draining else set()
        for model in serving:
            if model not in self.pools:
                self.pools[model] = ModelPool(self._config, self._left, self._policy_failed)
            self.pools[model].join(server.spec())
        for model, pool in self.pools.items():
            if model not in serving and not (server.is_draining and server.is_there):
                pool.lose(server.server_id, server.last_failure or "it serves the model no more")
        if server.is_draining and not server.is_there:
            self._forget(server.server_id)

    def _reported(self, server: PlainServer, load: InstanceLoad) -> None:
        for pool in self._pools_of(server.server_id):
            pool.report(load)

    def _policy_failed(self, policy: str) -> None:
        self.policy_failures[policy] += 1

    def _left(self, server_id: str) -> None:
        if not self._pools_of(server_id):
            self._forget(server_id)

    def _forget(self, server_id: str) -> None:
        if self.servers.pop(server_id, None) is not None:
            logger.info("%s has been drained", server_id)
            self._watching.pop(server_id).cancel()

    def _pools_of(self, server_id: str) -> list[ModelPool]:
        return [pool for pool in self.pools.values() if server_id in pool.server_ids]
