"""A server around a scripted model, in process and without a socket."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import httpx
import pytest
from scripted import Scripted

from octavo.serve.app import create_app
from octavo.serve.settings import ServeConfig
from octavo.tokenizer import CHATML, Byte, Tokenizer, train

Client = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]
REPLY = "Hello, 世界! <img src=x onerror=alert(1)>"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    made = train(Byte(), [])
    made.chat_template = made.chat_template or CHATML
    return made


@pytest.fixture
def client(tokenizer: Tokenizer) -> Client:
    """``async with client(reply=..., config=..., **settings of Scripted) as http``; ``http.app`` is the application."""

    @asynccontextmanager
    async def connect(
        reply: str = REPLY, config: ServeConfig | None = None, **settings: object
    ) -> AsyncIterator[httpx.AsyncClient]:
        model = Scripted([*tokenizer.encode(reply), tokenizer.special.eos], tokenizer.vocab_size, **settings)
        app = create_app(model, tokenizer, "tiny", config)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http,
        ):
            http.app, http.model = app, model  # type: ignore[attr-defined]
            yield http

    return connect


def chat(**more: object) -> dict:
    """A chat request."""
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, **more}


def events(response: httpx.Response) -> list[dict]:
    """The events of a stream, which must end in [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines[:-1]]
