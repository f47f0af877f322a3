"""A TCP proxy in front of servers that counts round trips: what the client sends after it heard.

It stands where the network would and sees what a driver really does, whatever it says it does.
Connections of sqlroute's monitor, which are nobody's statement, are not counted.
"""

from __future__ import annotations

import asyncio
import threading
import tomllib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

from sqlroute.local.topology import LocalTopology
from sqlroute.runtime.probe import APPLICATION_NAME
from sqlroute.testing import free_ports

_CHUNK = 65_536


@dataclass(slots=True)
class _Client:
    """One connection: whose turn it is to talk, and whether it counts."""

    has_heard: bool = True
    counts: bool = True


class Wire:
    """Proxies before all servers of a topology, for the length of a ``with`` block.

    Attributes:
        trips: round trips so far, over all connections.
    """

    def __init__(self, topology: LocalTopology) -> None:
        self.trips = 0
        self._topology = topology
        first = free_ports(len(topology.nodes))
        self.ports = {node.name: first + i for i, node in enumerate(topology.nodes)}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._servers: list[asyncio.Server] = []
        self._pumps: set[asyncio.Task[None]] = set()

    def config(self) -> dict[str, Any]:
        """Return the configuration of a router that reaches its servers by the wire."""
        text = self._topology.config_path.read_text()
        for node in self._topology.nodes:
            text = text.replace(f":{node.port}/", f":{self.ports[node.name]}/")
        found = tomllib.loads(text)
        # On a busy machine a late probe would send a read elsewhere, over a new connection.
        return {**found, "policy": {**found.get("policy", {}), "probe_deadline": "10s"}}

    def count(self, work: Callable[[], object]) -> int:
        """Return how many round trips a piece of work needs."""
        before = self.trips
        work()
        return self.trips - before

    async def count_async(self, work: Callable[[], Awaitable[object]]) -> int:
        before = self.trips
        await work()
        return self.trips - before

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        for node in self._topology.nodes:
            serve = partial(self._serve, node.conninfo["host"], node.port)
            server = await asyncio.start_server(serve, "127.0.0.1", self.ports[node.name])
            self._servers.append(server)

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _serve(
        self, host: str, port: int, heard: asyncio.StreamReader, answer: asyncio.StreamWriter
    ) -> None:
        client = _Client()
        said, forward = await asyncio.open_connection(host, port)
        pumps = {
            asyncio.create_task(self._up(client, heard, forward)),
            asyncio.create_task(self._down(client, said, answer)),
        }
        self._pumps |= pumps
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._pumps -= pumps
            for writer in (forward, answer):
                writer.close()

    async def _up(
        self, client: _Client, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        while data := await source.read(_CHUNK):
            if APPLICATION_NAME.encode() in data:  # it says so when it connects
                client.counts = False
            if client.has_heard and client.counts:
                self.trips += 1  # before the server can answer
            client.has_heard = False
            sink.write(data)
            await sink.drain()

    async def _down(
        self, client: _Client, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        while data := await source.read(_CHUNK):
            client.has_heard = True
            sink.write(data)
            await sink.drain()
