"""S14: OpenAI's own client, as people use it: answers, streams, errors by class, coming back when told to."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from serving import REPLY, Live, chat, live, small_decoder
from wire import CHAT, request

KEY = "sesame"
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
RESPOND: dict[str, Any] = {"model": "tiny", "input": "hi", "temperature": 0}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "hi", "temperature": 0, "max_tokens": 5}
# What is wrong, with the class of the error, its code and its field.
REFUSED: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], str | None, str | None]] = {
    "an unknown model": ({"model": "other"}, openai.NotFoundError, "model_not_found", "model"),
    "too many tokens": ({"max_tokens": 10**6}, openai.BadRequestError, "context_length_exceeded", "messages"),
    "a temperature": ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
    "no messages": ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
    "a role": ({"messages": [{"role": "x", "content": "y"}]}, openai.BadRequestError, "invalid_value",
    "messages.0.role"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        openai.BadRequestError, "invalid_value", "messages.0.content",
    ),
    "an unknown field": ({"extra_body": {"x_y": 1}}, openai.BadRequestError, "unsupported_parameter", "x_y"),
    "too many texts": ({"n": 1000}, openai.BadRequestError, "invalid_value", "n"),
    "scores of nothing": ({"top_logprobs": 3}, openai.BadRequestError, "invalid_value", "top_logprobs"),
    "a stream of a wrong request": ({"stream": True, "top_p": 2}, openai.BadRequestError, "invalid_value", "top_p"),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tokenizer: Any) -> Iterator[Live]:
    with live(tokenizer, settings={"api_keys": (KEY,)}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def said(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def answers(client: openai.OpenAI) -> Iterator[tuple[str, bool]]:
    """Every check is its name and whether it holds."""
    whole = client.chat.completions.create(**ASK)
    choice = whole.choices[0]
    yield "an answer", choice.message.content == REPLY and choice.message.role == "assistant"
    yield "why it ended", choice.finish_reason == "stop"
    yield "what it cost", whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**ASK, stream=True))
    yield "a stream", said(chunks) == REPLY
    yield "its role comes first", chunks[0].choices[0].delta.role == "assistant"
    yield "why it ended comes last", chunks[-1].choices[0].finish_reason == "stop"
    yield "one id", len({chunk.id for chunk in chunks}) == 1
    counted = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    yield "what a stream cost", counted[-1].usage == whole.usage and not counted[-1].choices
    with client.chat.completions.stream(**ASK) as helper:
        deltas = "".join(event.delta for event in helper if event.type == "content.delta")
        yield "the helper for streams", deltas == helper.get_final_completion().choices[0].message.content == REPLY
    short = client.chat.completions.create(**ASK, max_completion_tokens=5).choices[0]
    yield "few tokens", (short.message.content, short.finish_reason) == ("Hello", "length")
    stopped = client.chat.completions.create(**ASK, stop=[","]).choices[0]
    yield "a stop string", (stopped.message.content, stopped.finish_reason) == ("Hello", "stop")
    several = client.chat.completions.create(**ASK, n=3).choices
    yield "several answers", [(c.index, c.message.content) for c in several] == [(i, REPLY) for i in range(3)]
    scored = (
        client.chat.completions.create(**ASK, logprobs=True, top_logprobs=2, max_tokens=3).choices[0].logprobs.content
    )
    yield "scores", len(scored) == 3 and all(len(s.top_logprobs) == 2 and s.logprob <= 0 for s in scored)
    follow = [*ASK["messages"], choice.message, {"role": "user", "content": "more"}]
    yield (
        "an answer goes back",
        client.chat.completions.create(**{**ASK, "messages": follow}).choices[0].message.content == REPLY,
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    yield "parts of text", client.chat.completions.create(**{**ASK, "messages": parts}).usage == whole.usage
    ignored = client.chat.completions.create(**ASK, user="u", metadata={"a": "b"}, store=False)
    yield "fields without effect", ignored.choices[0].message.content == REPLY
    raw = client.chat.completions.with_raw_response.create(**ASK)
    yield "headers", raw.headers["content-type"] == "application/json" and raw.parse().usage == whole.usage
    with client.chat.completions.create(**ASK, stream=True) as stream:
        next(iter(stream))
    yield "a stream that is left", client.chat.completions.create(**ASK).choices[0].message.content == REPLY
    text = client.completions.create(**TEXT)
    yield "a text goes on", text.choices[0].text == "Hello"
    yield (
        "a streamed text",
        "".join(c.choices[0].text for c in client.completions.create(**TEXT, stream=True)) == "Hello",
    )
    listed = client.completions.create(**{**TEXT, "prompt": ["a", "b"]}).choices
    yield "several prompts", [c.text for c in listed] == ["Hello"] * 2
    yield "an echo", client.completions.create(**TEXT, echo=True).choices[0].text == "hiHello"
    yield "the models", [model.id for model in client.models.list()] == ["tiny"]
    yield "one model", client.models.retrieve("tiny").owned_by == "octavo"
    answer = client.responses.create(**RESPOND)
    yield "a response", answer.output_text == REPLY and answer.status == "completed"
    with client.responses.stream(**RESPOND) as events:
        deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        yield "a streamed response", deltas == REPLY


def by_others(server: Live, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Other clients, and servers in trouble."""

    async def asynchronous() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            stream = await client.chat.completions.create(**ASK, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    yield "the asynchronous client", asyncio.run(asynchronous()) == REPLY
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.models.list()
        yield "a wrong key", refused.value.code == "invalid_api_key"
    with live(tokenizer, "abcde" * 8, delay_seconds=0.02, settings={"max_requests": 1}) as busy:
        held = busy.raw(request(CHAT, chat(stream=True)))
        held.recv(1)
        once = openai.OpenAI(base_url=f"{busy.url}/v1", api_key="none", max_retries=0)
        with once, pytest.raises(openai.RateLimitError) as told:
            once.chat.completions.create(**ASK)
        yield "a busy server", told.value.code == "overloaded" and told.value.response.headers["retry-after"] == "1"
        with openai.OpenAI(base_url=f"{busy.url}/v1", api_key="none", max_retries=8) as client:
            yield "it comes back", client.chat.completions.create(**ASK).choices[0].message.content == "abcde" * 8
        held.close()
    with (
        live(tokenizer, fail_after=0) as broken,
        openai.OpenAI(base_url=f"{broken.url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError) as failed:
            client.chat.completions.create(**ASK)
        yield "a model that fails", failed.value.status_code == 500 and failed.value.code == "engine"
        broken.model.fail_after = 3
        with pytest.raises(openai.APIError):
            list(client.chat.completions.create(**ASK, stream=True))
        yield "a stream that fails in the middle", True
        broken.gate.draining = True
        with pytest.raises(openai.InternalServerError) as leaving:
            client.chat.completions.create(**ASK)
        yield "a server that goes down", leaving.value.status_code == 503
        threading.Timer(0.5, lambda: setattr(broken.gate, "draining", False)).start()
        broken.model.fail_after = None
        patient = client.with_options(max_retries=8)
        yield "and comes back", patient.chat.completions.create(**ASK).choices[0].message.content == REPLY
    with (
        live(tokenizer, model=small_decoder(tokenizer.vocab_size)) as vectors,
        openai.OpenAI(base_url=f"{vectors.url}/v1", api_key="none") as client,
    ):
        made = client.embeddings.create(model="tiny", input=["a", "b"])
        yield "vectors", [abs(sum(x * x for x in v.embedding) - 1) < 1e-4 for v in made.data] == [True] * 2


def refusals(client: openai.OpenAI) -> Iterator[tuple[str, bool]]:
    for name, (change, kind, code, param) in REFUSED.items():
        try:
            client.chat.completions.create(**{**ASK, **change})
            yield name, False
        except openai.APIStatusError as error:
            yield name, type(error) is kind and (error.code, error.param) == (code, param)


@pytest.mark.timeout(300)
def test_the_client_and_the_server_understand_each_other(
    server: Live, client: openai.OpenAI, tokenizer: Any, record: Callable[..., None]
) -> None:
    n, wrong = 0, list[str]()
    for checks in (answers(client), refusals(client), by_others(server, tokenizer)):
        try:
            for name, holds in checks:
                n += 1
                wrong += [] if holds else [name]
        except Exception:
            wrong.append(traceback.format_exc()[-600:])
    assert n >= 40 or wrong
    record("S14", n, wrong, version=openai.__version__)
