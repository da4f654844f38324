"""S13: every address with wrong keys, foreign hosts and origins, and paths that lead elsewhere; all are refused.

Each route of the application stands in one of the two lists below; a new one fails the first test until it does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from serving import chat
from wire import CHAT, Reply, ask, request

SECRET = "xyzzy-secret"
PAGE = ("/", "/chat.js", "/saved.js", "/talk.js", "/words.js", "/chat.css", "/icon.svg")
OPEN = frozenset(("/livez", *PAGE))
CLOSED = frozenset(
    ("/readyz", "/metrics", "/openapi.json", "/v1/models", "/v1/models/{model_id:path}", "/v1/chat/completions",
     "/v1/completions", "/v1/embeddings", "/v1/responses")
)  # fmt: skip
KEYS = (
    "", "Authorization: Bearer wrong", f"Authorization: Basic {SECRET}", f"Authorization: {SECRET}",
    f"Authorization: Bearer {SECRET}x", f"Authorization: Bearer {SECRET[:-1]}", "Authorization: Bearer",
    f"Authorization: Bearer {SECRET.upper()}", f"X-Api-Key: {SECRET}", f"Cookie: key={SECRET}",
    "Authorization: Bearer \udcff\udcfe",
)  # fmt: skip
HOSTS = (
    "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1:80@evil.example",
    "evil.example#localhost",
    "localhost:80:80", "localhost/evil", "", "0x7f000001.example", "[::1].evil.example", "localhost,evil.example",
    "local host",
)  # fmt: skip
ORIGINS = (
    "https://evil.example", "null", "http://localhost:9", "http://localhost.evil.example", "file://", "HTTP://EVIL",
    "http://localhost@evil.example", "chrome-extension://x", "http://127.0.0.1",
)  # fmt: skip
PATHS = tuple(
    f"{begin}{path}"
    for begin in ("/", "/v1/models/", "/chat.js/", "//", "/v1/../")
    for path in (
        "../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "....//....//etc/passwd",
        "..\\..\\windows",
        "..%5c..%5cwin.ini", "%252e%252e%252fetc", "..;/etc/passwd", "%00", "tiny%00.json", ".git/config",
        "etc/passwd?x=/",
        "%c0%ae%c0%ae/", "~root", "tiny/../../etc/passwd",
    )
)  # fmt: skip
POLICY = ("default-src 'self'", "script-src 'self'", "img-src 'self' data:", "object-src 'none'", "base-uri 'none'",
          "frame-ancestors 'none'")  # fmt: skip


def address(route: str) -> str:
    return route.replace("{model_id:path}", "tiny")


def asked(route: str, *headers: str, host: str = "localhost") -> bytes:
    """The request that an honest client would make there, with these headers."""
    given = [header for header in headers if header]
    if route.startswith("/v1/") and "models" not in route:
        return request(route, chat(max_tokens=1) if route == CHAT else {"model": "tiny"}, headers=given, host=host)
    return request(address(route), headers=given, host=host)


def refused(name: str, reply: Reply, status: int, code: str | None) -> list[str]:
    """What is wrong with a refusal."""
    wrong = [f"{name}: status {reply.status}"] if reply.status != status else []
    wrong += [f"{name}: the secret is in it"] if SECRET.encode() in reply.body else []
    policy = reply.headers.get("content-security-policy", "")
    if not all(part in policy for part in POLICY) or "unsafe" in policy:
        wrong.append(f"{name}: the policy is {policy}")
    if reply.headers.get("x-content-type-options") != "nosniff" or "access-control-allow-origin" in reply.headers:
        wrong.append(f"{name}: headers {reply.headers}")
    if not wrong and code and reply.error["code"] != code:
        wrong.append(f"{name}: code {reply.error['code']}")
    return wrong


Case = tuple[str, bytes, int, str | None]


def keys() -> list[Case]:
    return [
        (f"{route} with {key!r}", asked(route, key), 401, "invalid_api_key") for route in sorted(CLOSED) for key in KEYS
    ]


def hosts() -> list[Case]:
    good = f"Authorization: Bearer {SECRET}"
    return [
        (f"{route} as {host!r}", asked(route, good, host=host), 403, "host_not_allowed")
        for route in ("/", "/livez", "/metrics", "/v1/models", CHAT)
        for host in HOSTS
    ]


def origins() -> list[Case]:
    good = f"Authorization: Bearer {SECRET}"
    return [
        (f"{route} from {origin}", asked(route, good, f"Origin: {origin}"), 403, "origin_not_allowed")
        for route in ("/", "/metrics", "/v1/models", CHAT)
        for origin in ORIGINS
    ]


def paths() -> list[Case]:
    good = f"Authorization: Bearer {SECRET}"
    return [(path, request(path, headers=[good]), 404, None) for path in PATHS]


CASES = {"keys": keys, "hosts": hosts, "origins": origins, "paths": paths}


def test_every_route_is_classified(live: Any, record: Callable[..., None]) -> None:
    with live("ok", settings={"api_keys": (SECRET,)}) as server:
        routes = {route.path for route in server.app.routes}
        replies = [asyncio.run(ask(server.port, asked(route))) for route in sorted(OPEN)]
    wrong = [f"{route} is in no list" for route in sorted(routes - OPEN - CLOSED)]
    wrong += [f"{route} is not there" for route in sorted((OPEN | CLOSED) - routes)]
    for route, reply in zip(sorted(OPEN), replies, strict=True):
        wrong += refused(route, reply, 200, None)
    record("S13", len(routes), wrong, what="routes")


@pytest.mark.parametrize("what", CASES)
def test_what_is_not_for_this_client_is_refused(live: Any, record: Callable[..., None], what: str) -> None:
    async def each() -> list[str]:
        wrong = list[str]()
        for name, data, status, code in cases:
            wrong += refused(name, await ask(server.port, data), status, code)
        good = await ask(server.port, asked(CHAT, f"Authorization: Bearer {SECRET}"))
        return wrong + ([] if good.done else ["the right key does not let in"])

    cases = CASES[what]()
    with live("ok", settings={"api_keys": (SECRET,)}) as server:
        wrong = asyncio.run(each())
    record("S13", len(cases), wrong, what=what)
