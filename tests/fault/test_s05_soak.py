"""S5: many streams at once, of mixed lengths, some given up and some wrong; each answer is the one it would be alone.

``octavo_soak`` below is the whole of it; the slow test goes on for a minute.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from boxed import SCALE
from serving import Live, chat, small_decoder
from wire import CHAT, TEXT, Reply, ask, leave, read_reply, request

from octavo.infer.engine import Engine
from octavo.infer.request import EngineConfig
from octavo.serve.protocol import ChatRequest, CompletionRequest, validate
from octavo.serve.service import Service
from octavo.serve.settings import ServeConfig

SEED, STREAMS, CANCELLED, BAD = 5, 64, 0.05, 0.01
CONTEXT, ROOM = 512, 1600  # of the state: too little for all, so that some give way to others
SETTINGS = {"max_sequences": 32, "max_tokens": ROOM, "deterministic": True, "max_requests": 256}
QUESTIONS = 60
BEGINNINGS = ("", "You are a helpful little machine that answers in few words. ", "x" * 300)
LINES = ("What is a river?", "河是什么？", "Say three.", "a", "Tell me about boats and the people in them. " * 3)
WRONG: tuple[dict[str, Any], ...] = ({"temperature": -1}, {"max_tokens": 10**6}, {"model": "none"}, {"stop": [""]})


@dataclass
class Soak:
    """What was seen."""

    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    resident: list[tuple[float, float]] = field(default_factory=list)  # seconds, MiB

    @property
    def answered(self) -> int:
        return self.seen["whole"] + self.seen["streamed"] + self.seen["cancelled"]

    def slope(self) -> float:
        """MiB in ten minutes that memory grew by, a line through the second half."""
        points = self.resident[len(self.resident) // 2 :]
        n, xs, ys = len(points), [x for x, _ in points], [y for _, y in points]
        x0, y0 = sum(xs) / n, sum(ys) / n
        spread = sum((x - x0) ** 2 for x in xs)
        return 600 * sum((x - x0) * (y - y0) for x, y in points) / spread if spread else 0.0


def questions(n: int) -> list[tuple[str, dict[str, Any]]]:
    """Paths and bodies of requests: long and short, greedy and drawn, one text and two."""
    rng, found = random.Random(SEED), list[tuple[str, dict[str, Any]]]()
    for i in range(n):
        how: dict[str, Any] = {"max_tokens": rng.choice([1, 5, 20, 60]), "seed": i, "n": rng.choice([1, 1, 1, 2])}
        how |= {"temperature": rng.choice([0, 0.7, 1.3]), "top_p": rng.choice([1, 0.9])}
        how |= rng.choice(
            [{}, {}, {"stop": ["e"]}, {"repetition_penalty": 1.3}, {"top_k": 20}, {"logit_bias": {"101": 3}}]
        )
        text = rng.choice(BEGINNINGS) + rng.choice(LINES)
        if rng.random() < 0.5:
            found.append((TEXT, {"model": "tiny", "prompt": text, **how}))
        else:
            found.append((CHAT, chat(messages=[{"role": "user", "content": text}], **how)))
    return found


def alone(model: Any, tokenizer: Any, asked: list[tuple[str, dict[str, Any]]]) -> list[list[str]]:
    """The texts of each request from an engine that does nothing else, and shares nothing."""
    service = Service(model, tokenizer, "tiny", ServeConfig(max_sequences=1))
    config = EngineConfig(max_sequences=2, deterministic=True, share_prefixes=False)
    found = list[list[str]]()
    for path, body in asked:
        plan: Any = service.prepare(validate(ChatRequest if path == CHAT else CompletionRequest, body), "alone")
        engine, (made,) = Engine(model, tokenizer, config), plan.decoded.requests
        engine.add(made)
        texts = [""] * made.n
        for _, event in engine.run():
            texts[event.row] += event.text  # type: ignore[union-attr]
        found.append(texts)
    return found


def megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def cancelled(port: int, data: bytes, after: int) -> Reply:
    """Hear so many bytes, then leave."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    heard = b""
    while len(heard) < after and (part := await reader.read(after - len(heard))):
        heard += part
    leave(writer, reset=after % 2 == 0)
    known = asyncio.StreamReader()
    known.feed_data(heard)
    known.feed_eof()
    return await read_reply(known)


async def one(server: Live, asked: Any, expected: list[list[str]], rng: random.Random, soak: Soak) -> None:
    i, luck = rng.randrange(len(asked)), rng.random()
    path, body = asked[i]
    if luck < BAD:
        reply = await ask(server.port, request(path, {**body, **rng.choice(WRONG)}))
        soak.seen["refused"] += 1
        if reply.status not in (400, 404):
            soak.wrong.append(f"a wrong request got {reply.status}")
    elif luck < BAD + CANCELLED:
        reply = await cancelled(server.port, request(path, {**body, "stream": True}), rng.randint(1, 2500))
        soak.seen["cancelled"] += 1
        texts = reply.texts(len(expected[i])) if reply.status else [""] * len(expected[i])
        if not all(whole.startswith(text) for text, whole in zip(texts, expected[i], strict=True)):
            soak.wrong.append(f"request {i}, given up: {texts} is no beginning of {expected[i]}")
    else:
        stream = luck < 0.8
        reply = await ask(server.port, request(path, {**body, "stream": stream}), seconds=110)
        soak.seen["streamed" if stream else "whole"] += 1
        if not reply.done:
            soak.wrong.append(f"request {i} was lost: status {reply.status}, {reply.body[-300:]!r}")
        elif (texts := reply.texts(len(expected[i]))) != expected[i]:
            soak.wrong.append(f"request {i}: {texts}, alone {expected[i]}")


async def soaked(server: Live, asked: Any, expected: list[list[str]], goes_on: Callable[[Soak], bool]) -> Soak:
    """``STREAMS`` clients, each asking again when it has its answer, as long as ``goes_on``."""
    soak, began = Soak(), time.monotonic()

    async def client(number: int) -> None:
        rng = random.Random(f"{SEED} {number}")
        while goes_on(soak) and len(soak.wrong) < 10:
            await one(server, asked, expected, rng, soak)

    async def watch() -> None:
        while True:
            soak.resident.append((time.monotonic() - began, megabytes()))
            await asyncio.sleep(0.25)

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(client(number) for number in range(STREAMS)))
    watcher.cancel()
    return soak


def octavo_soak(live: Any, tokenizer: Any, record: Any, goes_on: Callable[[Soak], bool]) -> Soak:
    model = small_decoder(tokenizer.vocab_size, max_seq_len=CONTEXT)
    asked = questions(QUESTIONS)
    expected = alone(model, tokenizer, asked)
    assert len({str(texts) for texts in expected}) > QUESTIONS / 2
    with live(model=model, settings=SETTINGS) as server:
        soak = asyncio.run(soaked(server, asked, expected, goes_on))
        server.settled()
        until = time.monotonic() + 10
        held = ("octavo_running", "octavo_waiting", "octavo_slots_held", 'octavo_blocks{model="tiny",state="held"}')
        while left := {name: n for name in held if (n := server.metric(name))}:
            if time.monotonic() > until:
                soak.wrong.append(f"at the end {left}")
                break
        figures = {name: server.metric(f"octavo_{name}_total") for name in ("preempted", "shared_tokens", "engines")}
        if not (figures["preempted"] and figures["shared_tokens"] and figures["engines"] == 1):
            soak.wrong.append(f"memory was never short, nothing was shared, or an engine failed: {figures}")
    gc.collect()
    facts = {"seed": SEED, "seen": dict(soak.seen), "slope_mib_in_10_minutes": round(soak.slope(), 2), **figures}
    record("S5", soak.answered, soak.wrong, **facts, mib=[round(soak.resident[0][1]), round(soak.resident[-1][1])])
    return soak


def test_each_answer_is_the_one_it_would_be_alone(live: Any, tokenizer: Any, record: Callable[..., None]) -> None:
    octavo_soak(live, tokenizer, record, lambda soak: soak.seen.total() < 500 * SCALE)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_minute_of_it(live: Any, tokenizer: Any, record: Callable[..., None]) -> None:
    until = time.monotonic() + 60
    soak = octavo_soak(live, tokenizer, record, lambda _: time.monotonic() < until)
    half = [mib for _, mib in soak.resident[len(soak.resident) // 2 :]]
    assert max(half) - min(half) < 24, f"memory grows: {half[0]:.0f} to {half[-1]:.0f} MiB in half a minute"
