"""S11: prompts that just fit, that do not, and that are huge; each gets its own code, and the server stays awake."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from serving import Live, chat, small_decoder
from wire import CHAT, EMBED, RESPOND, TEXT, ask, request

from octavo.serve.body import MAX_BODY_BYTES

LIMIT, AWAKE_SECONDS = 64, 10.0
SIZES = ("one less", "full", "one more", "ten times", "8 MiB", "8 MiB and a byte")
WAYS = ("chat", "text", "tokens", "responses", "embeddings")


def body(way: str, n: int) -> tuple[str, dict[str, Any]]:
    """A request whose prompt has ``n`` letters or tokens of its own."""
    letters = "x" * n
    if way == "chat":
        return CHAT, chat(messages=[{"role": "user", "content": letters}], max_tokens=1)
    if way == "responses":
        return RESPOND, {"model": "tiny", "input": letters, "max_output_tokens": 1}
    if way == "embeddings":
        return EMBED, {"model": "tiny", "input": letters}
    return TEXT, {"model": "tiny", "prompt": [5] * n if way == "tokens" else letters, "max_tokens": 1}


def data_of(way: str, size: str, around: int) -> bytes:
    own = {"one less": LIMIT - 1, "full": LIMIT, "one more": LIMIT + 1, "ten times": 10 * LIMIT}
    if size in own:
        path, made = body(way, own[size] - around)
        return request(path, made)
    bytes_wanted = MAX_BODY_BYTES + (size != "8 MiB")
    path, made = body(way, 1)
    rest = bytes_wanted - len(json.dumps(made))
    if way == "tokens":  # each more is a comma and a digit
        content = json.dumps(body(way, 1 + rest // 3)[1]).encode()
    else:
        content = json.dumps(body(way, 1 + rest)[1]).encode()
    return request(path, content + b" " * (bytes_wanted - len(content)))


async def one(server: Live, way: str, size: str, around: int) -> tuple[str, float]:
    """What is wrong with the answer, and the longest that /livez took meanwhile."""
    slowest, over = [0.0], asyncio.Event()

    async def probe() -> None:
        while not over.is_set():
            began = time.monotonic()
            assert (await ask(server.port, request("/livez"))).status == 200
            slowest.append(time.monotonic() - began)
            await asyncio.sleep(0.01)

    probing = asyncio.create_task(probe())
    reply = await ask(server.port, data_of(way, size, around))
    over.set()
    await probing
    fits = size == "one less" or (size == "full" and way == "embeddings")
    status, code = (200, None) if fits else (400, "context_length_exceeded")
    status, code = (413, "body_too_large") if size == SIZES[-1] else (status, code)
    if reply.status != status or (code and reply.error["code"] != code):
        return f"{way}, {size}: status {reply.status}, not {status}: {reply.body[:200]!r}", max(slowest)
    if status == 400 and str(LIMIT) not in reply.error["message"]:
        return f"{way}, {size}: the limit is not said: {reply.error['message']}", max(slowest)
    if size == "8 MiB" and way != "tokens" and "characters" not in reply.error["message"]:
        return f"{way}, {size}: its tokens were made first", max(slowest)
    return "", max(slowest)


@pytest.mark.parametrize("way", WAYS)
def test_each_length_gets_its_own_code(live: Any, tokenizer: Any, record: Callable[..., None], way: str) -> None:
    wrong, slowest = list[str](), 0.0
    with live(model=small_decoder(tokenizer.vocab_size, max_seq_len=LIMIT)) as server:
        path, made = body(way, 1)
        usage = asyncio.run(ask(server.port, request(path, made))).json()["usage"]
        around = usage.get("prompt_tokens", usage.get("input_tokens")) - 1
        for size in SIZES:
            said, seconds = asyncio.run(one(server, way, size, around))
            wrong += [said] if said else []
            slowest = max(slowest, seconds)
    wrong += [f"{way}: /livez took {slowest:.1f} s"] if slowest > AWAKE_SECONDS else []
    record("S11", len(SIZES), wrong, way=way, slowest_livez_seconds=round(slowest, 3))
