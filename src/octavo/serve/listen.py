"""The socket, the signals and the clock around the application."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from octavo.errors import ConfigError
from octavo.serve.settings import ServeConfig
from octavo.serve.worker import Gate

INTERRUPTED = 130


def bind(config: ServeConfig) -> socket.socket:
    """Take the address before the model is loaded; nothing is accepted until ``listen``.

    Raises:
        ConfigError: the address is in use or not ours, or it is open to the network without a key.
    """
    if not config.api_keys and not _is_loopback(config.host):
        raise ConfigError(
            f"--host {config.host} is reachable from the network and there is no key",
            fix="add --api-key KEY (or set OCTAVO_API_KEY), or use --host 127.0.0.1",
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {config.host} is not an address of this machine: {error}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.set_inheritable(False)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {config.port} on {config.host} is in use",
                fix="choose another with --port, or stop the other server",
            ) from None
        what = os.strerror(error.errno or 0)
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {what}", fix="choose another --port"
        ) from None
    return sock


def listen(app: FastAPI, sock: socket.socket, config: ServeConfig) -> int:
    """Serve until SIGTERM or Ctrl-C; streams may finish within ``grace_seconds``, a second signal ends them now.

    Returns:
        The exit code: 0, or 130 after a second Ctrl-C.
    """
    server = make_server(app, config)
    server.run(sockets=[sock])
    return server.exit_code


def make_server(app: FastAPI, config: ServeConfig) -> Server:
    """Uvicorn for an application of ``create_app``."""
    settings = uvicorn.Config(
        app,
        http=type("TimedProtocol", (_TimedProtocol,), {name: getattr(config, name) for name in _TimedProtocol.LIMITS}),
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
    )
    return Server(settings, app.state.gate, config.grace_seconds)


class Server(uvicorn.Server):
    """Uvicorn, leaving with 0 after a signal: first no new work, then what runs may end, then the door closes."""

    def __init__(self, config: uvicorn.Config, gate: Gate, grace_seconds: float):
        super().__init__(config)
        self.gate, self.grace_seconds = gate, grace_seconds
        self.exit_code = 0
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._until is None:
            self.gate.draining = True
            self._until = time.monotonic() + self.grace_seconds
        else:
            self._until = 0.0
            self.force_exit = True
            self.exit_code = INTERRUPTED if sig == signal.SIGINT else 0

    async def on_tick(self, counter: int) -> bool:
        if self._until is not None and not self.should_exit:
            if time.monotonic() >= self._until:
                self.gate.stop_all()
                await asyncio.sleep(0.1)  # the error frames go out
            self.should_exit = not self.gate.open_jobs or time.monotonic() >= self._until
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # As uvicorn's, without raising the signal again at the end: a drained server has done what it was told.
        wanted = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        original = {sig: signal.signal(sig, self.handle_exit) for sig in wanted}
        try:
            yield
        finally:
            for sig, handler in original.items():
                signal.signal(sig, handler)


class _TimedProtocol(H11Protocol):
    """HTTP whose request line and headers must arrive in time, and whose answers must be read in time.

    uvicorn has a limit only between requests. A connection that it closes stays until the other side has read what
    was written, which a client that reads a byte now and then can draw out for days.
    """

    LIMITS = ("header_seconds", "stall_seconds")
    header_seconds = 10.0
    stall_seconds = 60.0
    _header_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        self._unwatch_reader()
        super().data_received(data)
        self._watch_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unwatch_reader()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_headers()  # of the next request, which may have begun to arrive with the last one
        self._watch_reader()  # of the end of this answer

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        self._unwatch_reader()
        super().connection_lost(exc)

    def _watch_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._unwatch()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_seconds, self._too_slow)

    def _too_slow(self) -> None:
        self._header_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.abort()

    def _watch_reader(self) -> None:
        if self._reader_timer is None and self.transport.get_write_buffer_size():
            # A little later than the stream's own clock (answers.EventStream), which says whose client it was.
            self._reader_timer = self.loop.call_later(1.2 * self.stall_seconds, self._unread)

    def _unread(self) -> None:
        self._reader_timer = None
        if self.transport.get_write_buffer_size():
            # By a reset: what the kernel still holds for this client is given up too.
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

    def _unwatch_reader(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _unwatch(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def announce(names: Sequence[str], sock: socket.socket, config: ServeConfig) -> None:
    """Say where the page and the endpoint are, and who can reach them."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{host}:{sock.getsockname()[1]}"
    reach = "only this machine can reach it" if _is_loopback(config.host) else "reachable from the network with the key"
    are = "is" if len(names) == 1 else "are"
    print(f"{', '.join(names)} {are} served at {address} ({reach}; Ctrl-C stops)")
    print(f"OpenAI clients: base_url={address}/v1, model={' or '.join(names)}", flush=True)
