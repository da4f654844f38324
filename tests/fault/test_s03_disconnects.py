"""S3: clients that leave at any moment, in any way; what they held is free soon, and nothing of them stays."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from boxed import SCALE
from serving import Live, chat, small_decoder
from wire import CHAT, EMBED, RESPOND, TEXT, ask, leave, quantile, request

SEED = 3
KINDS = ("stream", "whole", "queued", "prefill", "several", "half-close", "body", "embeddings", "responses", "headers")
EACH, MIXED, TOGETHER = 30 * SCALE, 200 * SCALE, 25
HELD = ("octavo_requests_open", "octavo_running", "octavo_waiting", "octavo_slots_held",
        'octavo_blocks{model="tiny",state="held"}')  # fmt: skip
DRAINED_SECONDS = 20.0


def wanted(kind: str, endless: dict[str, Any], rng: random.Random) -> bytes:
    """What a client of this kind sends before it leaves."""
    if kind == "prefill":
        return request(TEXT, {"model": "tiny", "prompt": "x" * rng.randint(700, 900), "stream": True, **endless})
    if kind == "embeddings":
        return request(EMBED, {"model": "tiny", "input": ["y" * rng.randint(1, 300) for _ in range(200)]})
    if kind == "responses":
        return request(RESPOND, {"model": "tiny", "input": "hi", "stream": True})
    whole = request(CHAT, chat(stream=kind != "whole", n=4 if kind == "several" else 1, temperature=1, **endless))
    if kind == "body":
        return whole[: -rng.randint(1, 40)]
    return whole[: rng.randint(0, 60)] if kind == "headers" else whole


async def one(server: Live, kind: str, endless: dict[str, Any], rng: random.Random) -> None:
    """Send, hear a little, leave."""
    data, reset, heard, patience = wanted(kind, endless, rng), rng.random() < 0.5, rng.randint(1, 3000), rng.random()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(data)
        await writer.drain()
        if kind == "half-close":
            writer.write_eof()
        if kind in ("stream", "several", "responses"):
            async with asyncio.timeout(patience):
                while heard > 0 and (part := await reader.read(heard)):
                    heard -= len(part)
        else:
            await asyncio.sleep(patience * 0.03)
    except (TimeoutError, ConnectionError):
        pass
    leave(writer, reset=reset)


async def drained(server: Live, n_tasks: int, n_files: int) -> tuple[str, float]:
    """What is still held when it should have been given back, and how long it took."""
    began = time.monotonic()
    while True:
        held = {line: figure for line in HELD if (figure := server.metric(line))}
        held |= {"tasks": server.tasks} if server.tasks > n_tasks else {}
        held |= {"files": files} if (files := len(os.listdir("/proc/self/fd"))) > n_files else {}
        seconds = time.monotonic() - began
        if not held or seconds > DRAINED_SECONDS:
            return str(held or ""), seconds
        await asyncio.sleep(0.005)


async def storm(server: Live, kinds: tuple[str, ...], n: int, bias: dict[str, float]) -> tuple[list[str], float]:
    """``n`` clients, some of them together; what went wrong, and how long the slowest group took to be gone."""
    rng, wrong, slowest = random.Random(f"{SEED} {kinds}"), list[str](), 0.0
    probe = request(CHAT, chat(max_tokens=8))
    expected = (await ask(server.port, probe)).texts()
    await asyncio.gather(*(ask(server.port, probe) for _ in range(8)))  # what is made once is made
    await asyncio.sleep(0.1)
    n_tasks, n_files = server.tasks, len(os.listdir("/proc/self/fd"))
    endless = {"logit_bias": bias}
    for begin in range(0, n, TOGETHER):
        group = [rng.choice(kinds) for _ in range(min(TOGETHER, n - begin))]
        await asyncio.gather(*(one(server, kind, endless, rng) for kind in group))
        held, seconds = await drained(server, n_tasks, n_files)
        slowest = max(slowest, seconds)
        if held:
            wrong.append(f"after {begin + len(group)} of {kinds}: {held}")
            break
    if (await ask(server.port, probe)).texts() != expected:
        wrong.append("the next request is answered otherwise")
    return wrong, slowest


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_who_leaves_gives_everything_back(
    live: Callable[..., Any], tokenizer: Any, record: Callable[..., None], kind: str
) -> None:
    model = small_decoder(tokenizer.vocab_size, max_seq_len=1024)
    bias = {str(token): -100.0 for token in tokenizer.stop_ids}
    n = MIXED if kind == "mixed" else EACH
    with live(model=model, settings={"max_sequences": 8}) as server:
        wrong, slowest = asyncio.run(storm(server, KINDS if kind == "mixed" else (kind,), n, bias))
        if kind in ("stream", "several"):  # they were in the middle of an answer: somebody noticed that they left
            assert server.metric("octavo_cancelled_total") > n / 2
        assert httpx.get(f"{server.url}/readyz").status_code == 200
    record("S3", n, wrong, seed=SEED, kind=kind, slowest_drain_seconds=round(slowest, 3))


def test_the_quantile_is_one_of_the_values() -> None:
    assert [quantile([3, 1, 2], share) for share in (0, 0.5, 0.99, 1)] == [1, 2, 3, 3]
