"""The network in front of a server: cut, or swallowing what it is given, both ways or one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from enum import Enum
from types import TracebackType
from typing import Any, Self

_CHUNK = 65_536
_RESET = struct.pack("ii", 1, 0)


class State(Enum):
    """What becomes of what is sent.

    Attributes:
        OPEN: it arrives.
        CUT: connections are reset, new ones refused.
        HOLE: connections are accepted, and nothing that is sent arrives, on old ones neither.
        DEAF: the server hears nothing any more, of what it says all arrives.
        MUTE: the server hears all, and nothing that it says arrives.
    """

    OPEN = "open"
    CUT = "cut"
    HOLE = "hole"
    DEAF = "deaf"
    MUTE = "mute"


class Cable:
    """A TCP proxy on a port of its own, for the length of a ``with`` block."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cable", daemon=True)
        self._server: asyncio.Server | None = None
        self._ends: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[Any]] = set()
        self._to_server = asyncio.Event()
        self._to_client = asyncio.Event()
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._run(self._cut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def turn(self, state: State) -> None:
        """Change what becomes of what is sent from now on."""
        self._run(self._turn(state))

    def _run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _turn(self, state: State) -> None:
        if state is State.CUT:
            await self._cut()
            return
        if self._server is None:
            await self._listen()
        for way, closed in ((self._to_server, State.DEAF), (self._to_client, State.MUTE)):
            if state in (State.HOLE, closed):
                way.clear()
            else:
                way.set()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        self._to_server.set()
        self._to_client.set()

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for end in list(self._ends):
            raw: socket.socket | None = end.get_extra_info("socket")
            if raw is not None:
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.transport.abort()
        for pump in list(self._pumps):
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pumps.add(task)
        self._ends.add(writer)
        far: asyncio.StreamWriter | None = None
        try:
            await self._to_server.wait()
            far_reader, far = await asyncio.open_connection(*self._target)
            self._ends.add(far)
            both = (
                self._pump(reader, far, self._to_server),
                self._pump(far_reader, writer, self._to_client),
            )
            pumps = [asyncio.ensure_future(one) for one in both]
            self._pumps.update(pumps)
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            self._pumps.difference_update(pumps)
        except (OSError, asyncio.CancelledError):  # the server is not there; the cable is cut
            pass
        finally:
            for end in (writer, far):
                if end is not None:
                    self._ends.discard(end)
                    end.transport.abort()
            self._pumps.discard(task)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: asyncio.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                await way.wait()
                writer.write(chunk)
                await writer.drain()
