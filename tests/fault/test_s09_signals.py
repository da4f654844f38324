"""S9: SIGTERM, Ctrl-C and SIGKILL while clients are answered: none ends short in silence, the next server starts."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable

import pytest
from boxed import SCALE
from forked_server import Forked, Parent, running
from serving import chat
from wire import CHAT, Reply, ask, request

SEED, STREAMS = 9, 8
ANSWER = "abcdefghij" * 6
TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
# The signals, the grace that streams get, the exit code, and whether every answer must come whole.
WAYS: dict[str, tuple[tuple[int, ...], float, int, bool]] = {
    "SIGTERM": ((TERM,), 20.0, 0, True),
    "Ctrl-C": ((INT,), 20.0, 0, True),
    "SIGTERM and little grace": ((TERM,), 0.1, 0, False),
    "Ctrl-C twice": ((INT, INT), 20.0, 130, False),
    "SIGKILL": ((KILL,), 20.0, -9, False),
}
EACH = 2 * SCALE


async def under_load(server: Forked, signals: tuple[int, ...], rng: random.Random) -> tuple[list[Reply], Reply]:
    """Clients that are being answered when the signals come, and one that comes after."""
    data = [request(CHAT, chat(stream=number % 2 == 0)) for number in range(STREAMS)]
    clients = [asyncio.create_task(ask(server.port, each)) for each in data]
    while server.metric("octavo_requests_open") < STREAMS:
        await asyncio.sleep(0.01)
    await asyncio.sleep(rng.random() * 0.1)
    for number in signals:
        server.signal(number)
        await asyncio.sleep(0.15)
    late = await ask(server.port, request(CHAT, chat()))
    return await asyncio.gather(*clients), late


def trouble(replies: list[Reply], late: Reply, *, whole: bool, running: bool) -> list[str]:
    """What is wrong with what the clients got."""
    wrong = list[str]()
    for reply in replies:
        if reply.done and reply.texts() != [ANSWER]:
            wrong.append(f"an answer ends short as if it were whole: {reply.texts()}")
        if whole and not reply.done:
            wrong.append(f"an answer was lost: {reply.status} {reply.body[-200:]!r}")
    if late.status and (late.status, late.error["code"], late.headers.get("retry-after")) != (
        503,
        "shutting_down",
        "5",
    ):
        wrong.append(f"who came after the signal got {late}")
    return wrong + (["who came after the signal was not told"] if running and late.status != 503 else [])


@pytest.mark.parametrize("way", WAYS)
def test_a_signal_under_load(forks: Parent, record: Callable[..., None], way: str) -> None:
    signals, grace, code, whole = WAYS[way]
    rng, wrong, settings = random.Random(f"{SEED} {way}"), list[str](), {"grace_seconds": grace}
    for _ in range(EACH):
        with running(forks, reply=ANSWER, delay_seconds=0.02, settings=settings) as server:
            replies, late = asyncio.run(under_load(server, signals, rng))
            wrong += [f"{way}: {text}" for text in trouble(replies, late, whole=whole, running=whole)]
            ended, log = server.wait(), server.log.read_text("utf-8")
            if ended != code or (log and code == 0):
                wrong.append(f"{way}: it ended with {ended}: {log[-500:]}")
            if server.left_behind:
                wrong.append(f"{way}: a process was left behind")
        began = time.monotonic()
        with running(forks, reply=ANSWER, settings={"port": server.port}) as again:
            if asyncio.run(ask(again.port, request(CHAT, chat()))).texts() != [ANSWER]:
                wrong.append(f"{way}: the next server answers otherwise")
        if (seconds := time.monotonic() - began) > 30:
            wrong.append(f"{way}: the next server took {seconds:.0f} s")
    record("S9", EACH, wrong, seed=SEED, way=way)
