"""A TCP proxy that cuts the line, or keeps answers back, when a test says so."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from typing import Self


class Proxy:
    """Passes bytes on between clients and a server on the loopback.

    `cut_after(n)`: end each line once n bytes of answers have passed, until `mend`. `hold` keeps answers
    back until `mend`; what clients ask still reaches the server. With `context`, clients speak TLS.
    """

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        self._target, self._context = port, context
        self._limit: int | None = None
        self._free = asyncio.Event()
        self._free.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.lines = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.mend()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def cut(self) -> None:
        """End every line there is."""
        for writer in list(self._writers):
            writer.transport.abort()

    def cut_after(self, count: int) -> None:
        self._limit = count

    def hold(self) -> None:
        self._free.clear()

    def mend(self) -> None:
        self._limit = None
        self._free.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.lines += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._target)
        mine = {writer, upstream_writer}
        self._writers |= mine
        asking = asyncio.create_task(self._pass(reader, upstream_writer))
        try:
            await self._answer(upstream_reader, writer)
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            self._writers -= mine
            for each in mine:
                each.transport.abort()
            self._tasks.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed = 0
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                await self._free.wait()
                if self._limit is not None and passed + len(data) > self._limit:
                    writer.write(data[: max(0, self._limit - passed)])
                    await writer.drain()
                    return
                passed += len(data)
                writer.write(data)
                await writer.drain()
