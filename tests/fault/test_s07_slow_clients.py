"""S7: hundreds of clients that send or read a byte now and then; each is cut off in time, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable

import pytest
from boxed import SCALE
from forked_server import Forked, Parent, running
from serving import chat
from wire import CHAT, TEXT, ask, quantile, request

SLOW, NORMAL, LIMIT = 200 * SCALE, 20, 1.5
LATE, PAUSE = 8.0, 0.25  # seconds beyond the limit, on a machine that does something else too; between two bytes
ANSWER = "abcdefghij" * 6
SETTINGS = {f"{what}_seconds": LIMIT for what in ("header", "body", "stall")}
# A slow reader is one only when what it does not read fills the buffers on the way.
MUCH = {"model": "tiny", "prompt": "\x01" * 1000, "n": 8, "echo": True, "max_tokens": 1, "stream": True}


async def slow(port: int, kind: str) -> float:
    """One slow client; the seconds until it was cut off, from when it became slow."""
    loop, sock = asyncio.get_running_loop(), socket.socket()
    sock.setblocking(False)
    if kind == "reader":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    data = request(TEXT, MUCH)
    sent = {"header": 20, "body": len(data) - 100, "reader": len(data)}[kind]
    try:
        await loop.sock_connect(sock, ("127.0.0.1", port))
        await loop.sock_sendall(sock, data[:sent])
        if kind == "reader":
            await loop.sock_recv(sock, 1)
        began = time.monotonic()
        while time.monotonic() - began < LIMIT + LATE + 2:
            await asyncio.sleep(PAUSE)
            if kind == "reader":
                if not await loop.sock_recv(sock, 1) or _gone(sock):
                    break
            else:
                with contextlib.suppress(BlockingIOError):
                    while said := sock.recv(4096):  # the refusal of a slow body, and then the end
                        assert b"408" in said or said.startswith(b"{"), said
                    break
                await loop.sock_sendall(sock, data[sent : sent + 1])
                sent += 1
    except ConnectionError:
        pass
    finally:
        sock.close()
    return time.monotonic() - began


def _gone(sock: socket.socket) -> bool:
    """Whether the other side has broken the connection off, although there is something left to read."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0 or _state(sock) != 1


def _state(sock: socket.socket) -> int:
    """Of the connection, as the kernel has it; 1 is established."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


async def normal(port: int) -> tuple[float, bool]:
    began = time.monotonic()
    reply = await ask(port, request(CHAT, chat(max_tokens=10)))
    return time.monotonic() - began, reply.done and reply.texts() == [ANSWER[:10]]


async def siege(server: Forked, kind: str) -> tuple[list[float], list[float], list[float], int]:
    before = [(await normal(server.port))[0] for _ in range(NORMAL)]
    clients = [asyncio.create_task(slow(server.port, kind)) for _ in range(SLOW)]
    await asyncio.sleep(0.3)
    during = [await normal(server.port) for _ in range(NORMAL)]
    cut = await asyncio.gather(*clients)
    return before, [seconds for seconds, _ in during], cut, sum(not right for _, right in during)


@pytest.mark.parametrize("kind", ["header", "body", "reader"])
def test_a_slow_client_is_cut_off(forks: Parent, record: Callable[..., None], kind: str) -> None:
    settings = {**SETTINGS, "max_requests": SLOW + NORMAL, "max_sequences": 64}
    with running(forks, reply=ANSWER, settings=settings, send_buffer=4096) as server:
        asyncio.run(normal(server.port))
        files = server.descriptors
        before, during, cut, failed = asyncio.run(siege(server, kind))
        soonest = 0 if kind == "reader" else LIMIT - 0.5  # when its answer was written a reader does not know
        wrong = [f"{kind}: cut off after {seconds:.1f} s" for seconds in cut if not soonest <= seconds <= LIMIT + LATE]
        wrong += [f"{kind}: {failed} of {NORMAL} others were not answered"] * bool(failed)
        until = time.monotonic() + 10
        while server.metric("octavo_requests_open") or server.descriptors > files + 2:
            if time.monotonic() > until:
                wrong.append(f"{kind}: {server.descriptors - files} connections are left")
                break
            time.sleep(0.05)
    facts = {"p95_before": round(quantile(before, 0.95), 3), "p95_meanwhile": round(quantile(during, 0.95), 3)}
    record("S7", SLOW, wrong, kind=kind, latest_seconds=round(max(cut), 2), **facts)
