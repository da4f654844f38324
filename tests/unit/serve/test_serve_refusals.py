"""Hostile and mistaken requests: the exact status, OpenAI's form, the field, and nothing repeated."""

import asyncio
import json
import math

import httpx
import pytest
from serving import Client, chat

from octavo.serve.body import MAX_BODY_BYTES, Bodies
from octavo.serve.settings import ServeConfig

SECRET = "xyzzy-secret"


def run(coroutine) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 60))


def deep(n: int) -> bytes:
    return b'{"model":"tiny","messages":' + b"[" * n + b"]" * n + b"}"


RAW = {
    "empty": b"",
    "not json": b"{model: tiny}",
    "truncated": b'{"model": "tiny"',
    "not an object": b"[1, 2]",
    "a string": b'"tiny"',
    "NaN": b'{"model":"tiny","temperature":NaN,"messages":[]}',
    "Infinity": b'{"model":"tiny","temperature":-Infinity,"messages":[]}',
    "1e999": b'{"model":"tiny","temperature":1e999,"messages":[]}',
    "5000 digits": b'{"model":"tiny","max_tokens":' + b"9" * 5000 + b"}",
    "65 deep": deep(64),
    "5000 deep": deep(5000),
    "a million deep": deep(1_000_000),
    "surrogate": rb'{"model":"tiny","messages":[{"role":"user","content":"\ud800"}]}',
    "surrogate key": rb'{"model":"tiny","\udfff":1}',
    "latin-1": '{"model":"tiny","messages":"é"}'.encode("latin-1"),
    "utf-16": '{"model":"tiny"}'.encode("utf-16"),
    "null byte in syntax": b'{"model":\x00"tiny"}',
}


@pytest.mark.parametrize("name", RAW)
def test_bodies_that_are_not_json(client: Client, name: str) -> None:
    async def body() -> None:
        async with client() as http:
            for path in ("/v1/chat/completions", "/v1/completions"):
                response = await http.post(path, content=RAW[name], headers={"Content-Type": "application/json"})
                check(response, 400, None, "invalid_json")
            assert (await http.post("/v1/chat/completions", json=chat())).status_code == 200, "no longer served"

    run(body())


def check(response: httpx.Response, status: int, param: str | None, code: str | None = None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert error["param"] == param, error
    assert code is None or error["code"] == code, error
    assert SECRET not in response.text


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def bad_tool(parameters: dict) -> dict:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def schema(value: dict) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def user(content: object, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": content, **more}]}


WRONG = [
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": 2.1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": 2}, 400, "top_p"),
    ({"top_k": -1}, 400, "top_k"),
    ({"min_p": 1.5}, 400, "min_p"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"presence_penalty": 3}, 400, "presence_penalty"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": -5}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"max_tokens": 10**30}, 400, "max_tokens"),
    ({"max_completion_tokens": 0}, 400, "max_completion_tokens"),
    ({"n": 0}, 400, "n"),
    ({"n": 10**6}, 400, "n"),
    ({"seed": 2**70}, 400, "seed"),
    ({"seed": "1"}, 400, "seed"),
    ({"stop": ["x"] * 10**5}, 400, "stop"),
    ({"stop": [""]}, 400, "stop.0"),
    ({"stop": ["x" * 1000]}, 400, "stop.0"),
    ({"stop": 5}, 400, "stop"),
    ({"logit_bias": {"999999": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"²": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias.5"),
    ({"logit_bias": [1]}, 400, "logit_bias"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage"),
    ({"logprobs": 5}, 400, "logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"model": "gpt-9"}, 404, "model"),
    ({"model": ["tiny"]}, 400, "model"),
    ({"model": None}, 400, "model"),
    ({"messages": []}, 400, "messages"),
    ({"messages": None}, 400, "messages"),
    ({"messages": "hi"}, 400, "messages"),
    ({"messages": [5]}, 400, "messages.0"),
    ({"messages": [{"role": "user", "content": "x"}] * 3000}, 400, "messages"),
    ({"messages": [{"role": SECRET, "content": "x"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.tool_call_id"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": SECRET}]}, 400, "messages.0.tool_call_id"),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"id": 5}]}]}, 400, "messages.0.tool_calls.0.id"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "[1]"}}]}]},
        400,
        "messages.0.tool_calls.0.function.arguments",
    ),
    ({"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    (user(5), 400, "messages.0.content"),
    (user([{"type": "image_url", "image_url": {"url": "http://x"}}]), 400, "messages.0.content"),
    (user("x", tool_calls=[CALL]), 400, "messages.0.tool_calls"),
    (user("x", tool_call_id=SECRET), 400, "messages.0.tool_call_id"),
    ({"tools": [{"type": "function"}]}, 400, "tools.0.function"),
    ({"tools": [TOOL | {"type": SECRET}]}, 400, "tools.0.type"),
    ({"tools": [{"type": "function", "function": {"name": f"{SECRET} !"}}]}, 400, "tools.0.function.name"),
    ({"tools": [TOOL, TOOL]}, 400, "tools"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tool_choice": SECRET, "tools": [TOOL]}, 400, "tool_choice.type"),
    ({"tool_choice": {"type": "function"}, "tools": [TOOL]}, 400, "tool_choice.function"),
    (
        {"tool_choice": {"type": "function", "function": {"name": SECRET}}, "tools": [TOOL]},
        400,
        "tool_choice.function.name",
    ),
    ({"tool_choice": "required", "tools": [bad_tool({"type": SECRET})]}, 400, "tools"),
    ({"response_format": {"type": SECRET}}, 400, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
    ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, 400, "response_format.json_schema"),
    (schema({"type": SECRET}), 400, "response_format.json_schema.schema"),
    (schema({"uniqueItems": True}), 400, "response_format.json_schema.schema"),
    (schema({"type": "string", "pattern": f"({SECRET}"}), 400, "response_format.json_schema.schema"),
    ({"typical_p": 0}, 400, "typical_p"),
    ({"temperature_end": 3}, 400, "temperature_end"),
    ({"temperature_end": 0.0, "temperature_path": "geometric"}, 400, "temperature_path"),
    ({"temprature": 1}, 400, "temprature"),
    ({SECRET: 1}, 400, None),
    ({SECRET * 1000: 1}, 400, None),
    ({"chat_template": "{{ 1 }}"}, 400, "chat_template"),
    ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, 400, "chat_template_kwargs"),
]


def test_wrong_values(client: Client) -> None:
    async def body() -> None:
        async with client() as http:
            for change, status, param in WRONG:
                response = await http.post("/v1/chat/completions", json=chat(**change))
                try:
                    check(response, status, param)
                except AssertionError as error:
                    raise AssertionError(f"{str(change)[:200]}: {error}") from None
            typo = (await http.post("/v1/chat/completions", json=chat(temprature=1))).json()["error"]["message"]
            assert "`temperature`" in typo
            own = (await http.post("/v1/chat/completions", json=chat(chat_template="x"))).json()["error"]["message"]
            assert own == "A request cannot bring its own template."
            assert (await http.post("/v1/chat/completions", json=chat())).status_code == 200

    run(body())


COMPLETIONS = [
    ({}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": ["a"] * 9}, "prompt"),
    ({"prompt": "a", "n": 9}, "n"),
    ({"prompt": ["a"] * 5, "n": 2}, "n"),
    ({"prompt": "a", "best_of": 2, "n": 3}, "best_of"),
    ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
    ({"prompt": ["a", "b"], "best_of": 8}, "n"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
]


def test_wrong_completions(client: Client) -> None:
    async def body() -> None:
        async with client() as http:
            for request, param in COMPLETIONS:
                response = await http.post("/v1/completions", json={"model": "tiny", **request})
                assert response.json()["error"]["param"] == param and response.status_code == 400, (request, response)
            mixed = await http.post("/v1/completions", json={"model": "tiny", "prompt": {"a": 1}})
            assert mixed.status_code == 400 and mixed.json()["error"]["param"].startswith("prompt")

    run(body())


def test_too_long_for_the_model(client: Client) -> None:
    async def body() -> None:
        async with client(max_seq_len=64) as http:
            base = (await http.post("/v1/chat/completions", json=chat(max_tokens=1))).json()["usage"]["prompt_tokens"]
            room = 64 - base
            fits = await http.post("/v1/chat/completions", json=chat(max_tokens=room))
            assert fits.status_code == 200 and fits.json()["usage"]["completion_tokens"] <= room
            over = await http.post("/v1/chat/completions", json=chat(max_tokens=room + 1))
            check(over, 400, "messages", "context_length_exceeded")
            assert "64" in over.json()["error"]["message"] and str(base) in over.json()["error"]["message"]
            free = (await http.post("/v1/chat/completions", json=chat())).json()  # no limit given: what is left
            assert free["choices"][0]["finish_reason"] in ("stop", "length")
            assert free["usage"]["total_tokens"] <= 64
            for n in (64, 640, 100_000):
                long = await http.post("/v1/chat/completions", json=chat(**user("x" * n)))
                check(long, 400, "messages", "context_length_exceeded")
            exact = await http.post("/v1/completions", json={"model": "tiny", "prompt": [5] * 63, "max_tokens": 1})
            assert exact.status_code == 200
            full = await http.post("/v1/completions", json={"model": "tiny", "prompt": [5] * 64, "max_tokens": 1})
            check(full, 400, "prompt", "context_length_exceeded")

    run(body())


def test_body_size_is_counted_not_believed(client: Client) -> None:
    async def endless():
        while True:
            yield b" " * 65536

    async def body() -> None:
        async with client() as http:
            headers = {"Content-Type": "application/json"}
            response = await http.post("/v1/chat/completions", content=endless(), headers=headers)
            check(response, 413, None, "body_too_large")
            filler = json.dumps(chat()).encode()
            padded = filler + b" " * (MAX_BODY_BYTES - len(filler))
            assert (await http.post("/v1/chat/completions", content=padded, headers=headers)).status_code == 200
            response = await http.post("/v1/chat/completions", content=padded + b" ", headers=headers)
            check(response, 413, None, "body_too_large")

    run(body())


def test_a_slow_body_is_given_up(client: Client) -> None:
    async def dripping():
        while True:
            yield b" "
            await asyncio.sleep(0.02)

    async def body() -> None:
        async with client(config=ServeConfig(body_seconds=0.2)) as http:
            headers = {"Content-Type": "application/json"}
            response = await http.post("/v1/chat/completions", content=dripping(), headers=headers)
            check(response, 408, None, "body_too_slow")

    run(body())


def test_all_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.serve.body.MAX_BUFFERED_BYTES", 1000)

    async def body() -> None:
        from fastapi import Request

        from octavo.serve.refusal import ApiError

        bodies = Bodies()
        more = asyncio.Event()

        def request(size: int) -> Request:
            parts = iter([b"x" * size, b""])

            async def receive() -> dict:
                part = next(parts)
                if not part:
                    await more.wait()
                return {"type": "http.request", "body": part, "more_body": bool(part)}

            return Request({"type": "http"}, receive)

        first = asyncio.create_task(bodies.read(request(900)))
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as caught:
            await bodies.read(request(200))
        assert caught.value.status == 429
        more.set()
        assert len(await first) == 900 and bodies.held == 0

    run(body())


KINDS = [
    None,
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "application/json; charset=utf-16",
]


@pytest.mark.parametrize("kind", KINDS)
def test_only_json_is_read(client: Client, kind: str | None) -> None:
    async def body() -> None:
        async with client() as http:
            headers = {} if kind is None else {"Content-Type": kind}
            response = await http.post("/v1/chat/completions", content=json.dumps(chat()), headers=headers)
            check(response, 415, None, "unsupported_media_type")
            zipped = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
            check(await http.post("/v1/chat/completions", content=b"x", headers=zipped), 415, None)

    run(body())


HOSTS = [
    ("127.0.0.1:8000", 200),
    ("localhost", 200),
    ("LOCALHOST:99", 200),
    ("[::1]:8000", 200),
    ("192.168.1.7:8000", 200),
    ("octavo.lan", 200),
    ("evil.example", 403),
    ("localhost.evil.example", 403),
    ("127.0.0.1.evil.example", 403),
    ("127.0.0.1:8000@evil.example", 403),
    ("localhost:80:80", 403),
    ("", 403),
]


def test_host_allow_list(client: Client) -> None:
    async def body() -> None:
        async with client(config=ServeConfig(allow_hosts=("octavo.lan",))) as http:
            for host, status in HOSTS:
                for path in ("/", "/v1/models", "/livez"):
                    assert (await http.get(path, headers={"Host": host})).status_code == status, host

    run(body())


def test_other_sites_are_refused(client: Client) -> None:
    async def body() -> None:
        async with client() as http:
            for origin, status in [
                ("http://127.0.0.1:8000", 200),
                ("https://evil.example", 403),
                ("null", 403),
                ("http://127.0.0.1:9999", 403),
                ("http://127.0.0.1:8000.evil.example", 403),
                ("http://localhost:8000", 403),
            ]:
                response = await http.post("/v1/chat/completions", json=chat(max_tokens=1), headers={"Origin": origin})
                assert response.status_code == status, origin
                assert "access-control-allow-origin" not in response.headers
            twice = [("Origin", "http://127.0.0.1:8000"), ("Origin", "https://evil.example")]
            assert (await http.get("/v1/models", headers=twice)).status_code == 400

    run(body())


# Every route is either open or needs the key; a new one must be put here on purpose.
OPEN = {"/", "/chat.js", "/saved.js", "/talk.js", "/words.js", "/chat.css", "/icon.svg", "/livez"}
CLOSED = {
    "/readyz",
    "/metrics",
    "/openapi.json",
    "/v1/models",
    "/v1/models/{model_id:path}",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
}


def test_the_key_guards_every_route(client: Client) -> None:
    async def body() -> None:
        async with client(config=ServeConfig(api_keys=(SECRET,))) as http:
            routes = {route.path: route.methods for route in http.app.routes}
            assert set(routes) == OPEN | CLOSED
            good = {"Authorization": f"Bearer {SECRET}"}
            for path, methods in routes.items():
                for method in methods:
                    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {SECRET}"}):
                        response = await http.request(method, path, headers=given)
                        if path in OPEN:
                            assert response.status_code == 200, path
                        elif method != "HEAD":
                            check(response, 401, None, "invalid_api_key")
            assert (await http.get("/v1/models", headers=good)).status_code == 200
            assert (await http.post("/v1/chat/completions", json=chat(), headers=good)).status_code == 200
            odd = {"Authorization": b"Bearer \xff\xfe"}
            assert (await http.get("/v1/models", headers=odd)).status_code == 401

    run(body())


def test_unknown_addresses_and_methods(client: Client) -> None:
    async def body() -> None:
        async with client() as http:
            for path in ("/nothing", "/../etc/passwd", "/chat.js/..%2f..%2fsecret", "/docs", "/v1/models/../../x"):
                response = await http.get(path)
                assert response.status_code == 404 and response.json()["error"]["type"] == "invalid_request_error"
            check(await http.get("/v1/chat/completions"), 405, None)
            check(await http.delete("/v1/models"), 405, None)

    run(body())


def test_every_answer_carries_the_security_headers(client: Client) -> None:
    async def body() -> None:
        async with client() as http:
            for response in (
                await http.get("/"),
                await http.get("/nothing"),
                await http.get("/", headers={"Host": "evil.example"}),
                await http.post("/v1/chat/completions", json=chat()),
                await http.post("/v1/chat/completions", json=chat(stream=True)),
            ):
                policy = response.headers["content-security-policy"]
                for part in (
                    "default-src 'self'",
                    "script-src 'self'",
                    "img-src 'self' data:",
                    "object-src 'none'",
                    "base-uri 'none'",
                    "frame-ancestors 'none'",
                ):
                    assert part in policy
                assert "unsafe" not in policy
                assert response.headers["x-content-type-options"] == "nosniff"

    run(body())


def test_non_finite_settings_cannot_reach_the_sampler() -> None:
    with pytest.raises(ValueError):
        ServeConfig(grace_seconds=math.nan)
