"""S6: a thousand clients at once; who is accepted gets all of its answer, everybody else is told to come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from boxed import SCALE
from forked_server import Forked, Parent, running
from serving import chat
from wire import CHAT, Reply, ask, quantile, request

CLIENTS, PLACES = 1000, 128
ANSWER = "abcdefghij" * 3
TOO_LATE, MIB = 10.0, 200  # seconds; a machine that does something else too


async def timed(port: int, data: bytes) -> tuple[Reply, float]:
    began = time.monotonic()
    return await ask(port, data, seconds=100), time.monotonic() - began


async def burst(server: Forked) -> tuple[list[tuple[Reply, float]], list[float]]:
    """All clients at once; and how long /livez took while they were there."""
    alive, over = list[float](), asyncio.Event()

    async def probe() -> None:
        while not over.is_set():
            reply, seconds = await timed(server.port, request("/livez"))
            alive.append(seconds if reply.status == 200 else TOO_LATE)
            await asyncio.sleep(0.02)

    probing = asyncio.create_task(probe())
    data = [request(CHAT, chat(stream=number % 2 == 0)) for number in range(CLIENTS)]
    answers = await asyncio.gather(*(timed(server.port, each) for each in data))
    over.set()
    await probing
    return answers, alive


def test_a_thousand_clients_at_once(forks: Parent, record: Callable[..., None]) -> None:
    wrong, refusals, lives, n, grown = list[str](), list[float](), list[float](), 0, 0.0
    settings = {"max_requests": PLACES, "max_sequences": 64}
    with running(forks, reply=ANSWER, delay_seconds=0.002, settings=settings) as server:
        for _ in range(SCALE):
            before, files = server.resident, server.descriptors
            answers, alive = asyncio.run(burst(server))
            grown = max(grown, (server.resident - before) / 2**20)
            lives += alive
            n += len(answers)
            served = [reply for reply, _ in answers if reply.status == 200]
            wrong += [
                f"an answer is {reply.body[-200:]!r}" for reply in served if not reply.done or reply.texts() != [ANSWER]
            ]
            for reply, seconds in answers:
                if reply.status == 429:
                    refusals.append(seconds)
                    if reply.headers.get("retry-after") != "1" or reply.error["code"] != "overloaded":
                        wrong.append(f"a refusal is {reply}")
                elif reply.status != 200:
                    wrong.append(f"status {reply.status}: {reply.body[:200]!r}")
            if not PLACES <= len(served) < CLIENTS:
                wrong.append(f"{len(served)} of {CLIENTS} were served by {PLACES} places")
            until = time.monotonic() + 10
            while server.metric("octavo_requests_open") or server.descriptors > files + 2:
                time.sleep(0.05)
                if time.monotonic() > until:
                    wrong.append("places or connections were not given back")
                    break
        log = server.log.read_text("utf-8")
    late = quantile(refusals, 0.99), quantile(lives, 0.99)
    facts = {"refused_p99_seconds": round(late[0], 3), "livez_p99_seconds": round(late[1], 3), "mib": round(grown, 1)}
    wrong += [f"too late: {late}"] if max(late) > TOO_LATE else []
    wrong += [f"{grown:.0f} MiB more"] if grown > MIB else []
    wrong += [f"the log says {log[-500:]}"] if log else []
    record("S6", n, wrong, served=n - len(refusals), **facts)
