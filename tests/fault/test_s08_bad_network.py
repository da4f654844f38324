"""S8: a network that delays, fragments, breaks off, resets; a client has the whole answer or knows that it has not."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from boxed import SCALE
from fault_proxy import NONE, Proxy, Toxic, proxy
from serving import Live, chat
from wire import CHAT

ANSWER = "Hello, 世界! " * 2
FIRST = 2000
CUTS = list(range(0, FIRST, max(1, FIRST // (100 * SCALE))))
SHAPES = {"whole": chat(), "streamed": chat(stream=True)}
SETTINGS = {"header_seconds": 2.0, "body_seconds": 2.0}


@contextmanager
def between(live: Any) -> Iterator[tuple[Live, Proxy, httpx.Client]]:
    """A server, a bad network before it, and a client that takes a new connection each time."""
    limits = httpx.Limits(max_keepalive_connections=0)
    with (
        live(ANSWER, settings=SETTINGS) as server,
        proxy(server.port) as network,
        httpx.Client(base_url=f"http://127.0.0.1:{network.port}", limits=limits, timeout=20) as http,
    ):
        yield server, network, http


def heard(http: httpx.Client, shape: str) -> str | None:
    """The answer as a client takes it; None where it can see that it has none."""
    try:
        response = http.post(CHAT, json=SHAPES[shape])
        if response.status_code != 200:
            return None
        if shape == "whole":
            return response.json()["choices"][0]["message"]["content"]
        lines = [line[6:] for line in response.text.split("\n\n") if line]
        if not lines or lines[-1] != "[DONE]":
            return None
        return "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1])
    except (httpx.TransportError, ValueError):
        return None


def left(server: Live) -> str:
    """What the server still holds when it should hold nothing."""
    until = time.monotonic() + 15
    while True:
        held = {
            name: n for name in ("requests_open", "running", "slots_held") if (n := server.metric(f"octavo_{name}"))
        }
        if not held:
            return ""
        if time.monotonic() > until:
            return str(held)
        time.sleep(0.01)


@pytest.mark.parametrize("reset", [False, True], ids=["cut", "reset"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cut_in_the_answer_is_seen(live: Any, record: Callable[..., None], shape: str, reset: bool) -> None:
    wrong, n_whole = list[str](), 0
    with between(live) as (server, network, http):
        assert heard(http, shape) == ANSWER
        length = network.passed_down[-1]
        files = len(os.listdir("/proc/self/fd"))
        cuts = CUTS[1::2] if reset else CUTS[::2]
        for cut in [*cuts, length - 1]:
            network.down = Toxic(cut=cut, reset=reset)
            answer = heard(http, shape)
            n_whole += answer is not None
            if answer is not None and (answer != ANSWER or cut < length - 16):
                wrong.append(f"{shape}, cut at byte {cut} of {length}: {answer!r}")
        network.down = NONE
        wrong += filter(None, [left(server)])
        if heard(http, shape) != ANSWER:
            wrong.append("the next request is answered otherwise")
        while len(os.listdir("/proc/self/fd")) > files + 2:
            time.sleep(0.01)
    record("S8", len(cuts) + 1, wrong, shape=shape, reset=reset, answered=n_whole)


@pytest.mark.parametrize("reset", [False, True], ids=["cut", "reset"])
def test_a_cut_in_the_request_costs_the_server_nothing(live: Any, record: Callable[..., None], reset: bool) -> None:
    with between(live) as (server, network, http):
        cuts = range(0, 400, max(1, 10 // SCALE))
        wrong = list[str]()
        for cut in cuts:
            network.up = Toxic(cut=cut, reset=reset)
            if (answer := heard(http, "whole")) not in (None, ANSWER):
                wrong.append(f"the request cut at byte {cut}: {answer!r}")
        network.up = NONE
        wrong += filter(None, [left(server)])
        assert heard(http, "whole") == ANSWER
    record("S8", len(cuts), wrong, where="request", reset=reset)


PIECES = [Toxic(slices=1), Toxic(slices=3), Toxic(latency=0.005, slices=200), Toxic(rate=100_000), Toxic(latency=0.05)]


@pytest.mark.parametrize("way", ["up", "down", "both"])
def test_what_only_comes_slowly_and_in_pieces_comes_whole(live: Any, record: Callable[..., None], way: str) -> None:
    wrong = list[str]()
    with between(live) as (_, network, http):
        for toxic in PIECES:
            network.up, network.down = (toxic if way != "down" else NONE), (toxic if way != "up" else NONE)
            wrong += [f"{way} {shape} {toxic}" for shape in SHAPES if heard(http, shape) != ANSWER]
    record("S8", 2 * len(PIECES), wrong, way=way)


def test_the_openai_client_sees_it_too(live: Any, record: Callable[..., None]) -> None:
    wrong, cuts = list[str](), range(10, FIRST, 100)
    with (
        between(live) as (_, network, _http),
        openai.OpenAI(base_url=f"http://127.0.0.1:{network.port}/v1", api_key="none", max_retries=0) as client,
    ):
        for cut in cuts:
            network.down = Toxic(cut=cut, reset=cut % 3 == 0)
            text, reason = "", None
            try:
                for chunk in client.chat.completions.create(**chat(stream=True)):
                    text += chunk.choices[0].delta.content or ""
                    reason = chunk.choices[0].finish_reason or reason
                if text != ANSWER or reason != "stop":
                    wrong.append(f"cut at byte {cut}: {text!r} as if that were all")
            except (openai.APIError, httpx.TransportError):
                pass
    record("S8", len(cuts), wrong, client="openai")
