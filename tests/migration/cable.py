"""A connection between two instances that can be cut, as a network does."""

from __future__ import annotations

import asyncio


class Cable:
    """The way of all connections to one endpoint. Call its methods on the loop it was made on."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._address = (host, int(port))
        self._is_cut = False
        self._ends: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._server: asyncio.Server | None = None

    async def lay(self) -> str:
        """The endpoint to connect to instead."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        there_reader, there_writer = await asyncio.open_connection(*self._address)
        self._ends += [writer, there_writer]
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            self._tasks.append(asyncio.create_task(self._carry(source, sink)))

    @staticmethod
    async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)

    def cut(self) -> None:
        """Whatever is on its way is lost."""
        self._is_cut = True
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()

    async def mend(self) -> None:
        """Connections can be made again."""
        self._is_cut = False

    async def remove(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)
