"""Requests that no honest client sends, by hand: broken JSON, wrong values in every field, and broken HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jsonschema
from serving import chat
from wire import CHAT, EMBED, RESPOND, TEXT, request

from octavo.serve.body import MAX_BODY_BYTES
from octavo.serve.embeddings import EmbeddingRequest
from octavo.serve.protocol import ChatRequest, CompletionRequest
from octavo.serve.responses import ResponseRequest

RIGHT: dict[str, dict[str, Any]] = {
    CHAT: chat(max_tokens=3),
    TEXT: {"model": "tiny", "prompt": "hi", "max_tokens": 3},
    EMBED: {"model": "tiny", "input": "hi"},
    RESPOND: {"model": "tiny", "input": "hi", "max_output_tokens": 3},
}
MODELS = {CHAT: ChatRequest, TEXT: CompletionRequest, EMBED: EmbeddingRequest, RESPOND: ResponseRequest}
SECRET = "xyzzy-secret"


@dataclass(frozen=True)
class Hostile:
    """One request and what must come of it.

    Attributes:
        statuses: any of these; 0 is a connection that is closed without an answer.
        param: the field that is named, or one inside it; None: no field.
        checked: whether the body must have the form of an error.
    """

    name: str
    data: bytes
    statuses: tuple[int, ...]
    param: str | None = None
    code: str | None = None
    checked: bool = True


def bodies() -> Iterator[Hostile]:
    """What is not JSON, or not JSON as we take it."""
    raw = {
        "nothing": b"", "not json": b"{model: tiny}", "cut": b'{"model": "tiny"', "a list": b"[1, 2]",
        "a string": b'"tiny"', "null": b"null", "a number": b"5", "NaN": b'{"model":"tiny","temperature":NaN}',
        "Infinity": b'{"model":"tiny","temperature":-Infinity}', "1e999": b'{"model":"tiny","temperature":1e999}',
        "5000 digits": b'{"model":"tiny","max_tokens":' + b"9" * 5000 + b"}",
        "65 deep": b'{"a":' * 65 + b"1" + b"}" * 65,
        "65 lists deep": b'{"a":' + b"[" * 64 + b"]" * 64 + b"}",
        "5000 deep": b'{"model":"tiny","messages":' + b"[" * 5000 + b"]" * 5000 + b"}",
        "a million deep": b"[" * 1_000_000, "a million objects deep": b'{"a":' * 1_000_000,
        "surrogate": rb'{"model":"tiny","x":"\ud800"}', "surrogates in the wrong order": rb'{"x":"\udc00\ud800"}',
        "surrogate key": rb'{"model":"tiny","\udfff":1}', "surrogate deep inside": rb'{"a":[[{"b":["\udabc"]}]]}',
        "latin-1": '{"model":"é"}'.encode("latin-1"), "utf-16": '{"model":"tiny"}'.encode("utf-16"),
        "utf-32": '{"model":"tiny"}'.encode("utf-32"), "BOM": b'\xef\xbb\xbf{"model":"tiny"}', "NUL": b'{"a":\x00"b"}',
        "overlong utf-8": b'{"a":"\xc0\xaf"}', "cut utf-8": b'{"a":"\xe4\xbd"}', "two values": b"{}{}",
        "trailing comma": b'{"a":1,}', "comment": b'{"a":1 /* x */}', "hex": b'{"a":0x10}',
        "tab in text": b'{"a":"\t"}',
        "bad escape": rb'{"a":"\x41"}', "single quotes": b"{'a': 1}", "leading zero": b'{"a":01}', "plus": b'{"a":+1}',
        "form": b"model=tiny&messages=hi", "multipart": b"--x\r\nContent-Disposition: form-data\r\n\r\n{}\r\n--x--",
        "pickle": b"\x80\x04\x95\x1a\x00", "gzip": b"\x1f\x8b\x08\x00\x00", "yaml": b"model: tiny\n", "xml": b"<a/>",
    }  # fmt: skip
    for path in MODELS:
        for name, content in raw.items():
            yield Hostile(f"{path} {name}", request(path, content), (400,), None, "invalid_json")


VALUES: tuple[Any, ...] = (
    SECRET, "", 1.5, -1, -0.001, 10**30, 1e300, True, [], [[]], [SECRET], [1.5], {}, {SECRET: 1}, {"type": SECRET},
)  # fmt: skip


def fields() -> Iterator[Hostile]:
    """Every field of every body with values that its own schema does not allow."""
    for path, kind in MODELS.items():
        document = kind.model_json_schema()
        for name, schema in document["properties"].items():
            judge = jsonschema.Draft202012Validator({**schema, "$defs": document.get("$defs", {})})
            for value in VALUES:
                if not judge.is_valid(value):
                    data = request(path, {**RIGHT[path], name: value})
                    yield Hostile(f"{path} {name} = {str(value)[:30]}", data, (400,), name)
            if name in document["required"]:
                body = {key: value for key, value in RIGHT[path].items() if key != name}
                yield Hostile(f"{path} without {name}", request(path, body), (400,), name)
        for name in ("chat_template", "chat_template_kwargs", "temprature", "__class__", "logits_processor"):
            body = {**RIGHT[path], name: "{{ 1 }}"}
            yield Hostile(f"{path} with {name}", request(path, body), (400,), name, "unsupported_parameter")
        yield Hostile(f"{path} with a strange field", request(path, {**RIGHT[path], SECRET: 1}), (400,), None)
        yield Hostile(f"{path} of no model", request(path, {**RIGHT[path], "model": SECRET}), (404,), "model")


def frames() -> Iterator[Hostile]:
    """HTTP that is broken, smuggles a second request, or belongs to another protocol."""
    right = request(CHAT, RIGHT[CHAT])
    head, _, body = right.partition(b"\r\n\r\n")
    get = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"

    def with_head(*lines: bytes, without: bytes = b"Content-Length") -> bytes:
        kept = [line for line in head.split(b"\r\n") if not line.startswith(without)]
        return b"\r\n".join([*kept, *lines, b"", b""])

    broken = {
        "no version": b"GET /\r\n\r\n", "HTTP/0.9": b"GET /\n\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9,
        "noise": bytes(range(256)) * 4, "NULs": bytes(1000), "SSH": b"SSH-2.0-OpenSSH_9\r\n\r\n", "bare LF": b"\n" * 99,
        "a space before the colon": get + b"Accept : x\r\n\r\n", "a header without a colon": get + b"Accept\r\n\r\n",
        "a NUL in a header": get + b"Accept: a\0b\r\n\r\n", "no method": b" / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "a header without a name": get + b": x\r\n\r\n",
        "no length that is one": with_head(b"Content-Length: x") + body,
        "a negative length": with_head(b"Content-Length: -5") + body, "two lengths":
        with_head(b"Content-Length: 5", b"Content-Length: 6") + body,
        "a length in hex": with_head(b"Content-Length: 0x5"),
        "a chunk that is none": with_head(b"Transfer-Encoding: chunked") + b"zz\r\n{}\r\n0\r\n\r\n",
        "a negative chunk": with_head(b"Transfer-Encoding: chunked") + b"-2\r\n{}\r\n0\r\n\r\n",
        "a chunk with a wrong end": with_head(b"Transfer-Encoding: chunked") + b"2\r\n{}XX0\r\n\r\n",
        "an endless chunk size": with_head(b"Transfer-Encoding: chunked") + b"0" * 100_000,
        "another encoding": with_head(b"Transfer-Encoding: gzip") + body,
        "an encoding twice": with_head(b"Transfer-Encoding: chunked, chunked") + b"0\r\n\r\n",
        "two encodings": with_head(b"Transfer-Encoding: identity, chunked") + b"0\r\n\r\n",
        "a header of 200 kB": get + b"X: " + b"x" * 200_000 + b"\r\n\r\n", "an address of 200 kB":
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "20,000 headers": get + b"A: b\r\n" * 20_000,
        "no Host": b"GET /v1/models HTTP/1.1\r\n\r\n", "two Hosts": get + b"Host: localhost\r\n\r\n",
    }  # fmt: skip
    for name, data in broken.items():
        yield Hostile(name, data, (0, 400, 413, 414, 431, 501, 505), checked=False)
    json_kind = "Content-Type: application/json"
    refused: dict[str, tuple[bytes, int, str | None]] = {
        "no Host in 1.0": (b"GET /v1/models HTTP/1.0\r\n\r\n", 403, "host_not_allowed"),
        "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 403, "host_not_allowed"),
        "an empty Host": (request("/v1/models", host=""), 403, "host_not_allowed"),
        "a foreign Host": (request("/v1/models", host="evil.example"), 403, "host_not_allowed"),
        "a foreign Origin": (request("/v1/models", headers=["Origin: http://evil.example"]), 403, "origin_not_allowed"),
        "no Origin that is one": (request("/v1/models", headers=["Origin: null"]), 403, "origin_not_allowed"),
        "two types": (request(CHAT, b"{}", headers=[json_kind, json_kind]), 400, "duplicate_header"),
        "another type": (request(CHAT, b"{}", headers=["Content-Type: text/plain"]), 415, "unsupported_media_type"),
        "a form": (request(CHAT, b"a=b", headers=["Content-Type: application/x-www-form-urlencoded"]), 415, None),
        "another charset": (request(CHAT, b"{}", headers=[f"{json_kind}; charset=utf-7"]), 415, None),
        "a compressed body": (request(CHAT, b"{}", headers=[json_kind, "Content-Encoding: gzip"]), 415, None),
        "too large": (request(CHAT, b" " * (MAX_BODY_BYTES + 1)), 413, "body_too_large"),
        "too large in chunks": (
            with_head(b"Transfer-Encoding: chunked") + (b"100000\r\n" + b" " * (1 << 20) + b"\r\n") * 9, 413,
            "body_too_large",
        ),
        "another address": (request("/v1/nothing"), 404, None), "an address with a NUL": (request("/v1/%00"), 404,
        None),
        "a query is no address": (request("/v1?/models"), 404, None),
        **{f"{word} on an address": (request("/v1/models", method=word), 405, None)
           for word in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW", "get")},
        **{f"{word} where one asks": (request(CHAT, method=word), 405, None)
           for word in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS")},
    }  # fmt: skip
    for name, (data, status, code) in refused.items():
        yield Hostile(name, data, (status,), None, code, checked=" HEAD " not in f" {name} ")
    # A second request in the body of the first must not be answered as if it stood alone.
    inner = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    yield Hostile("a request as a body", request(CHAT, inner), (400,), None, "invalid_json")
    smuggled = with_head(b"Content-Length: 6", b"Transfer-Encoding: chunked") + b"0\r\n\r\n" + inner
    yield Hostile("length and chunks", smuggled, (0, 400), checked=False)


def all_requests() -> list[Hostile]:
    return [*frames(), *bodies(), *fields()]
