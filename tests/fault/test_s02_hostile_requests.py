"""S2: requests that no honest client sends; each gets the status and the field that it deserves, and nothing of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
from hostile_requests import RIGHT, SECRET, Hostile, bodies, fields, frames
from serving import Live, small_decoder
from wire import CHAT, ask, request

GROUPS: dict[str, Callable[[], Any]] = {"frames": frames, "bodies": bodies, "fields": fields}
CANARY_EVERY = 10


async def trouble(server: Live, case: Hostile) -> str:
    """What is wrong with the answer, if anything."""
    reply = await ask(server.port, case.data)
    if reply.status not in case.statuses:
        return f"{case.name}: status {reply.status}, not {case.statuses}: {reply.body[:200]!r}"
    if SECRET.encode() in reply.body:
        return f"{case.name}: what was sent is repeated"
    if not case.checked or not reply.status:
        return ""
    try:
        error = reply.error
    except (AssertionError, ValueError, KeyError, TypeError) as failure:
        return f"{case.name}: not the form of an error: {failure!r} {reply.body[:200]!r}"
    named = error["param"]
    if named != case.param and not str(named).startswith(f"{case.param}."):
        return f"{case.name}: names {named}, not {case.param}"
    return f"{case.name}: code {error['code']}" if case.code not in (None, error["code"]) else ""


async def all_of(server: Live, cases: list[Hostile]) -> list[str]:
    probe, wrong = request(CHAT, RIGHT[CHAT]), list[str]()
    expected = (await ask(server.port, probe)).texts()
    for number, case in enumerate(cases):
        wrong += filter(None, [await trouble(server, case)])
        if number % CANARY_EVERY == 0 and (await ask(server.port, probe)).texts() != expected:
            wrong.append(f"{case.name}: the next request is answered otherwise")
    return wrong


@pytest.mark.parametrize("group", GROUPS)
def test_each_gets_what_it_deserves(
    live: Callable[..., Any], tokenizer: Any, record: Callable[..., None], group: str
) -> None:
    cases = list(GROUPS[group]())
    with live(model=small_decoder(tokenizer.vocab_size, max_seq_len=256)) as server:
        wrong = asyncio.run(all_of(server, cases))
        server.settled()
        assert server.tasks < 20, "connections are left open"
    record("S2", len(cases), wrong, group=group)


def test_what_is_right_is_taken(live: Callable[..., Any], tokenizer: Any) -> None:
    """The bodies that the wrong ones are made of."""

    async def each(server: Live) -> list[int]:
        return [(await ask(server.port, request(path, body))).status for path, body in RIGHT.items()]

    with live(model=small_decoder(tokenizer.vocab_size, max_seq_len=256)) as server:
        assert asyncio.run(each(server)) == [200] * 4


def test_the_fields_are_those_of_the_server() -> None:
    tried = {case.param for case in fields()}
    assert {"messages", "prompt", "input", "logit_bias", "stop", "tools", "text"} <= tried
    assert all(json.loads(case.data.partition(b"\r\n\r\n")[2]) for case in islice(fields(), 50))
