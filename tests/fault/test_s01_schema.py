"""S1: requests made from the server's own description of itself, right ones and wrong ones; none is answered by a 5xx.

They are drawn by schema_fuzz.py and, fewer but of another hand, by schemathesis. That an
answer has the right form is judged by the types of OpenAI's package.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import httpx
import openai.types as theirs
import pytest
from boxed import SCALE
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response as ResponsesAnswer
from pydantic import BaseModel
from schema_fuzz import Fuzz
from serving import Live, chat, small_decoder
from wire import CHAT, EMBED, RESPOND, TEXT

MODES = ("valid", "wrong")
POSTS = (CHAT, TEXT, EMBED, RESPOND)
GETS = ("/livez", "/readyz", "/metrics", "/v1/models", "/v1/models/{model_id}")
CASES, FEW, SEED = 250 * SCALE, 20 * SCALE, 1
CANARY_EVERY, MOST_TOKENS = 50, 6
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
CHECKS = ("status_code_conformance", "content_type_conformance", "response_schema_conformance",
          "response_headers_conformance")  # fmt: skip
ANSWERS: dict[str, type[BaseModel]] = {
    CHAT: ChatCompletion, TEXT: theirs.Completion, EMBED: theirs.CreateEmbeddingResponse, RESPOND: ResponsesAnswer,
}  # fmt: skip
CHUNKS: dict[str, type[BaseModel]] = {CHAT: ChatCompletionChunk, TEXT: theirs.Completion}


@pytest.fixture(scope="module")
def fuzzed(tokenizer: Any) -> Iterator[Live]:
    from serving import live

    with live(tokenizer, model=small_decoder(tokenizer.vocab_size, max_seq_len=256)) as server:
        yield server


def judge(path: str, response: httpx.Response) -> str:
    """What is wrong with an answer, if anything."""
    if response.status_code >= 500 or response.status_code == 499:
        return f"status {response.status_code}"
    try:
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        elif path in ANSWERS and response.headers["content-type"].startswith("text/event-stream"):
            events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
            if path in CHUNKS:
                assert events.pop() == "[DONE]" and events
            for event in map(json.loads, events):
                assert "error" not in event or event["type"].startswith("response.")
                if path == TEXT:  # their type is that of a whole answer: in a stream there is none until the end
                    for choice in event["choices"]:
                        choice["finish_reason"] = choice["finish_reason"] or "stop"
                if path in CHUNKS:
                    CHUNKS[path].model_validate(event)
        elif path in ANSWERS:
            answer = response.json()
            for item in answer["data"] if path == EMBED else ():
                if isinstance(item["embedding"], str):  # their types are of what their client makes of it
                    item["embedding"] = [x for (x,) in struct.iter_unpack("<f", base64.b64decode(item["embedding"]))]
            ANSWERS[path].model_validate(answer)
    except (AssertionError, ValueError, KeyError) as error:
        return f"status {response.status_code}: {str(error)[:300]}: {response.text[:300]}"
    return ""


def limited(path: str, body: Any, rng: random.Random) -> Any:
    """Most bodies name the model that is there and ask for few tokens: they get beyond the first check."""
    if not isinstance(body, dict):
        return body
    if isinstance(body.get("model"), str) and rng.random() < 0.95:
        body["model"] = "tiny"
    if path == CHAT and isinstance(body.get("messages"), list) and rng.random() < 0.7:
        keep = "role", "content"  # what goes with which role a schema does not say
        body["messages"] = [
            {name: m[name] for name in keep if isinstance(m, dict) and name in m} for m in body["messages"]
        ]
        for message in body["messages"]:
            message |= {"role": "user"} if message.get("role") == "tool" else {}
            message |= {} if message.get("content") else {"content": "hi"}
    for name in LIMITS:
        if type(body.get(name)) is int and body[name] > MOST_TOKENS and rng.random() < 0.9:
            body[name] = MOST_TOKENS
    if path != EMBED and all(body.get(name) is None for name in LIMITS):
        body[LIMITS[0] if path in (CHAT, TEXT) else LIMITS[2]] = MOST_TOKENS
    return body


class Watched:
    """Counts the answers of one row of the fuzz, and sees whether an honest request is still answered as before."""

    def __init__(self, server: Live, path: str, mode: str):
        self.path, self.mode, self.pid = path, mode, os.getpid()
        self.http = httpx.Client(base_url=server.url, timeout=20)
        self.wrong, self.seen = list[str](), Counter[int]()
        self.expected = self._canary()

    def _canary(self) -> Any:
        return self.http.post(CHAT, json=chat(max_tokens=4)).json()["choices"]

    def note(self, said: str, status: int, sent: Any) -> None:
        self.seen[status] += 1
        if said:
            self.wrong.append(f"{self.path} {self.mode}: {said}; sent {str(sent)[:300]}")
        if self.seen.total() % CANARY_EVERY == 0 and self._canary() != self.expected:
            self.wrong.append("the next request is answered otherwise")

    def end(self, record: Callable[..., None]) -> None:
        assert os.getpid() == self.pid and self._canary() == self.expected
        assert self.http.get("/readyz").status_code == 200
        self.http.close()
        statuses = {str(status): n for status, n in sorted(self.seen.items())}
        if self.seen.total():
            record("S1", self.seen.total(), self.wrong, path=self.path, mode=self.mode, statuses=statuses)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", POSTS)
def test_bodies_of_the_schema_and_spoilt_ones(fuzzed: Live, record: Callable[..., None], path: str, mode: str) -> None:
    document = httpx.get(f"{fuzzed.url}/openapi.json").json()
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fuzz, watched = Fuzz(schema, document, (SEED, path, mode)), Watched(fuzzed, path, mode)
    for _ in range(CASES):
        if mode == "valid":
            body = json.dumps(limited(path, fuzz.right(), fuzz.rng)).encode()
        else:
            body = fuzz.wrong()
            with contextlib.suppress(ValueError, RecursionError):
                body = json.dumps(limited(path, json.loads(body), fuzz.rng)).encode()
        answer = watched.http.post(path, content=body, headers={"Content-Type": "application/json"})
        watched.note(judge(path, answer), answer.status_code, body)
    reached = watched.seen[200]
    watched.end(record)
    assert reached >= (CASES / 4 if mode == "valid" else 3), f"the fuzz does not reach the model: {watched.seen}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", [*POSTS, *GETS])
def test_what_schemathesis_makes_of_it(fuzzed: Live, record: Callable[..., None], path: str, mode: str) -> None:
    try:
        tool, checks = import_module("schemathesis"), import_module("schemathesis.specs.openapi.checks")
        from schemathesis.checks import not_a_server_error
    except ImportError:
        record("S1", 0, 0, skipped="no schemathesis")
        pytest.skip("schemathesis is not installed")
    wanted = [not_a_server_error, *(getattr(checks, name) for name in CHECKS)]
    schema = tool.openapi.from_dict(httpx.get(f"{fuzzed.url}/openapi.json").json())
    operation = schema[path]["POST" if path in POSTS else "GET"]
    kind = tool.GenerationMode.POSITIVE if mode == "valid" else tool.GenerationMode.NEGATIVE
    watched = Watched(fuzzed, path, mode)

    @settings(
        max_examples=FEW, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=kind), seed=st.integers(0, 2**32))
    def one(case: Any, seed: int) -> None:
        limited(path, case.body, random.Random(seed))
        response = case.call(base_url=fuzzed.url, timeout=20)
        said = judge(
            path, httpx.Response(response.status_code, headers=_flat(response.headers), content=response.content)
        )
        try:
            case.validate_response(response, checks=wanted)
        except (AssertionError, BaseExceptionGroup) as failure:
            said = said or f"schemathesis: {str(failure)[:500]}"
        watched.note(said, response.status_code, case.body)

    try:
        one()
    except Exception as error:  # an address without parameters cannot be asked wrongly
        if type(error).__name__ not in ("Unsatisfiable", "SkipTest"):
            raise
    watched.end(record)


def _flat(headers: dict[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else value[0] for name, value in headers.items()
            if name.lower() not in ("transfer-encoding", "content-encoding")}  # fmt: skip


def test_the_description_is_whole(fuzzed: Live) -> None:
    document = httpx.get(f"{fuzzed.url}/openapi.json").json()
    assert {*document["paths"]} == {*POSTS, *GETS}
    text = json.dumps(document)
    for name in document["components"]["schemas"]:
        assert f'"#/components/schemas/{name}"' in text
    for reference in {part.partition('"')[0] for part in text.split('"$ref": "')[1:]}:
        where: Any = document
        for word in reference.removeprefix("#/").split("/"):
            where = where[word]
