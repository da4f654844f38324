"""A bad network in the middle: a TCP proxy on loopback that delays, cuts into pieces, breaks off and resets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from wire import RESET


@dataclass(frozen=True)
class Toxic:
    """What happens to the bytes of one direction.

    Attributes:
        latency: seconds before each piece is passed on.
        slices: bytes in a piece at most; 0: as they come.
        rate: bytes in a second at most; 0: no limit.
        cut: the connection ends after so many bytes; None: it does not.
        reset: it ends by RST and not by FIN.
    """

    latency: float = 0.0
    slices: int = 0
    rate: float = 0.0
    cut: int | None = None
    reset: bool = False


NONE = Toxic()


@dataclass
class Proxy:
    """A proxy to ``target``; ``up`` (what a client sends) and ``down`` hold for connections that begin from now on."""

    target: int
    port: int = 0
    up: Toxic = NONE
    down: Toxic = NONE
    passed_down: list[int] = field(default_factory=list)  # of each connection: bytes that came from the server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up, down, number = self.up, self.down, len(self.passed_down)
        self.passed_down.append(0)
        try:
            to, out = await asyncio.open_connection("127.0.0.1", self.target)
        except ConnectionError:
            writer.transport.abort()
            return
        ends = writer, out
        ways = (self._pass(reader, out, up, ends, None), self._pass(to, writer, down, ends, number))
        try:
            await asyncio.gather(*ways)
        finally:
            for end in ends:
                end.close()

    async def _pass(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        toxic: Toxic,
        ends: tuple[asyncio.StreamWriter, ...],
        number: int | None,
    ) -> None:
        sent = 0
        with contextlib.suppress(ConnectionError):
            while not target.is_closing():
                if toxic.cut is not None and sent >= toxic.cut:
                    self._break_off(toxic, ends)
                    return
                data = await source.read(65536)
                if not data:
                    break
                while data and (toxic.cut is None or sent < toxic.cut):
                    size = toxic.slices or len(data)
                    size = size if toxic.cut is None else min(size, toxic.cut - sent)
                    piece, data = data[:size], data[size:]
                    if toxic.latency:
                        await asyncio.sleep(toxic.latency)
                    target.write(piece)
                    await target.drain()
                    sent += len(piece)
                    if number is not None:
                        self.passed_down[number] = sent
                    await asyncio.sleep(len(piece) / toxic.rate if toxic.rate else 0)
            if not target.is_closing():
                target.write_eof()

    def _break_off(self, toxic: Toxic, ends: tuple[asyncio.StreamWriter, ...]) -> None:
        """Both sides see the end."""
        for end in ends:
            if toxic.reset:
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            end.close()  # what was written before still goes out


@contextlib.contextmanager
def proxy(target: int) -> Iterator[Proxy]:
    """A proxy in a thread of its own."""
    made, loop, ready = Proxy(target), asyncio.new_event_loop(), threading.Event()

    async def run() -> None:
        server = await asyncio.start_server(made._serve, "127.0.0.1", 0)
        made.port = server.sockets[0].getsockname()[1]
        ready.set()
        with contextlib.suppress(asyncio.CancelledError):
            await server.serve_forever()

    task = loop.create_task(run())
    thread = threading.Thread(target=loop.run_until_complete, args=(task,), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield made
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        for rest in asyncio.all_tasks(loop):
            rest.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
