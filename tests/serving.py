"""A server around a scripted model: in process without a socket, or on a socket of its own."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any

import httpx
from fastapi import FastAPI
from scripted import Scripted

from octavo.models.decoder import Decoder, build
from octavo.serve.app import create_app, serve_all
from octavo.serve.embeddings import Vectors
from octavo.serve.listen import Server, bind, make_server
from octavo.serve.metrics import Metrics
from octavo.serve.service import LookUp, Service
from octavo.serve.settings import ServeConfig
from octavo.tokenizer import CHATML, Byte, Tokenizer, train

Client = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]
REPLY = "Hello, 世界! <img src=x onerror=alert(1)>"


def chat_tokenizer() -> Tokenizer:
    """One token a byte, with a chat template."""
    made = train(Byte(), [])
    made.chat_template = made.chat_template or CHATML
    return made


@asynccontextmanager
async def connect(
    tokenizer: Tokenizer, reply: str = REPLY, config: ServeConfig | None = None, **settings: object
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application without a socket; ``settings`` are those of Scripted."""
    model = Scripted([*tokenizer.encode(reply), tokenizer.special.eos], tokenizer.vocab_size, **settings)
    app = create_app(model, tokenizer, "tiny", config)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http,
    ):
        http.app, http.model = app, model  # type: ignore[attr-defined]
        yield http


def small_decoder(vocab_size: int, causal: bool = True, max_seq_len: int = 64) -> Decoder:
    """Untrained, with a state of blocks."""
    block = {"mixer": {"kind": "attention", "n_heads": 2}, "channel": {"kind": "mlp"}}
    config = {"d_model": 16, "n_layers": 2, "max_seq_len": max_seq_len, "vocab_size": vocab_size, "causal": causal,
              "blocks": {"b": block}, "init": {"std": 0.4}}  # fmt: skip
    return build(Decoder.Config.model_validate(config), seed=3).eval()


def chat(**more: object) -> dict:
    """A chat request."""
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, **more}


def events(response: httpx.Response) -> list[dict]:
    """The events of a stream, which must end in [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines[:-1]]


class Live:
    """A running server and what a test wants to see of it."""

    def __init__(self, port: int, model: Scripted, app: FastAPI, server: Server) -> None:
        self.port, self.model, self.gate, self.app, self._server = port, model, app.state.gate, app, server
        self.url = f"http://127.0.0.1:{port}"

    def post(self, seconds: float = 30, **more: object) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=chat(**more), timeout=seconds)

    def raw(self, request: bytes, receive_bytes: int | None = None) -> socket.socket:
        sock = socket.socket()
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.connect(("127.0.0.1", self.port))
        sock.settimeout(20)
        sock.sendall(request)
        return sock

    def metric(self, line: str) -> float:
        """The figure of /metrics whose line begins with ``line``; 0 where there is none."""
        text = httpx.get(f"{self.url}/metrics").text
        found = [float(own.rpartition(" ")[2]) for own in text.splitlines() if own.startswith(line)]
        return sum(found)

    @property
    def tasks(self) -> int:
        """What its event loop has to do: one task a connection, and its own."""
        return len(asyncio.all_tasks(self._server.servers[0].get_loop()))

    def settled(self) -> None:
        """Wait until nothing is open, then until the model has stopped."""
        until = time.monotonic() + 5
        while self.gate.open_jobs and time.monotonic() < until:
            time.sleep(0.005)
        assert not self.gate.open_jobs


@contextmanager
def live(
    tokenizer: Tokenizer,
    reply: str = REPLY,
    send_buffer: int | None = None,
    settings: dict | None = None,
    name: str = "tiny",
    others: Mapping[str, str] | None = None,
    model: Any = None,
    look_up: LookUp | None = None,
    **more: object,
) -> Iterator[Live]:
    """A server on a socket of its own, in a thread.

    Args:
        others: more models, by name, and what each says.
        model: instead of a scripted one.
        more: settings of Scripted.
    """
    model = model or Scripted([*tokenizer.encode(reply), tokenizer.special.eos], tokenizer.vocab_size, **more)
    config = ServeConfig(port=0, **(settings or {}))
    sock = bind(config)
    if send_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    metrics = Metrics()
    vectors = Vectors(model, tokenizer) if hasattr(model, "config") else None
    services = [Service(model, tokenizer, name, config, look_up, vectors=vectors, metrics=metrics)]
    for other, says in (others or {}).items():
        scripted = Scripted([*tokenizer.encode(says), tokenizer.special.eos], tokenizer.vocab_size)
        services.append(Service(scripted, tokenizer, other, config, metrics=metrics))
    app = serve_all(services, config, metrics)
    server = make_server(app, config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Live(sock.getsockname()[1], model, app, server)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
