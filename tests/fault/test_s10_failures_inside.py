"""S10: something inside the server raises while it works on one request; that one fails, and nobody else."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from boxed import SCALE
from scripted import Scripted
from serving import Live, chat
from wire import CHAT, TEXT

from octavo.infer import engine as engines
from octavo.infer.engine import Engine
from octavo.infer.text import CertainText
from octavo.serve import protocol
from octavo.tokenizer import Tokenizer

POISON = "#"
ANSWER = "abcdefghij" * 4
GOOD, REPEATS = 3, 2 * SCALE
Patch = pytest.MonkeyPatch


class Fragile(Scripted):
    """Fails where a prompt has POISON: raises, or gives numbers that are none."""

    how, poison = "", -1

    def __call__(self, inputs: Any, state: Any = None, needs: Any = ("logits",)) -> Any:
        out = super().__call__(inputs, state, needs)
        rows = (inputs.tokens == self.poison).any(-1)
        if self.how == "raises" and rows.any():
            raise RuntimeError("the model")
        if self.how == "not finite":
            out.logits[rows] = torch.nan
        return out


def poisoned(*texts: Any) -> bool:
    return any(POISON in str(text) for text in texts)


def model_raises(model: Fragile, _: Patch) -> None:
    model.how = "raises"


def model_is_not_finite(model: Fragile, _: Patch) -> None:
    model.how = "not finite"


def detokenizer(model: Fragile, patch: Patch) -> None:
    push, unlucky = CertainText.push, model.reply[4]

    def fragile(text: CertainText, token: int, is_end: bool) -> Any:
        if text.stops == ("poison",) and token == unlucky:
            raise ValueError("the detokenizer")
        return push(text, token, is_end)

    patch.setattr(CertainText, "push", fragile)


def tokenizer(_: Fragile, patch: Patch) -> None:
    encode = Tokenizer.encode
    patch.setattr(
        Tokenizer, "encode", lambda self, text, **more: 1 / 0 if poisoned(text) else encode(self, text, **more)
    )


def template(_: Fragile, patch: Patch) -> None:
    render = Tokenizer.render
    patch.setattr(
        Tokenizer, "render", lambda self, said, **more: 1 / 0 if poisoned(said) else render(self, said, **more)
    )


def sampler(_: Fragile, patch: Patch) -> None:
    choose = engines.choose

    def fragile(logits: Any, config: Any, *rest: Any) -> Any:
        if config.stop == ("poison",):
            raise RuntimeError("the sampler")
        return choose(logits, config, *rest)

    patch.setattr(engines, "choose", fragile)


def scores(_: Fragile, patch: Patch) -> None:
    real = protocol.choice_scores
    patch.setattr(protocol, "choice_scores", lambda *given: 1 / 0)
    assert real is not protocol.choice_scores


KINDS: dict[str, tuple[Callable[[Fragile, Patch], None], dict[str, Any]]] = {
    "the model raises": (model_raises, {}),
    "the model gives NaN": (model_is_not_finite, {}),
    "the detokenizer": (detokenizer, {"stop": "poison"}),
    "the tokenizer": (tokenizer, {}),
    "the template": (template, {}),
    "the sampler": (sampler, {"stop": "poison"}),
    "the scores": (scores, {"logprobs": True}),
}


def guilty(kind: str, stream: bool) -> tuple[str, dict[str, Any]]:
    """The request that fails."""
    more = KINDS[kind][1]
    if kind == "the tokenizer":
        return TEXT, {"model": "tiny", "prompt": POISON, "stream": stream}
    return CHAT, chat(messages=[{"role": "user", "content": POISON}], stream=stream, **more)


def failed_in_order(response: httpx.Response | None) -> bool:
    """A 500 in the one form; in a stream that has begun, an error and then its end; or it was visibly broken off."""
    if response is None:
        return True
    if response.status_code == 500:
        return response.json()["error"]["type"] == "server_error"
    return response.status_code == 200 and '"error"' in response.text and response.text.endswith("data: [DONE]\n\n")


@contextlib.contextmanager
def fragile(live: Any, tokenizer: Tokenizer, kind: str, patch: Patch) -> Iterator[Live]:
    model = Fragile([*tokenizer.encode(ANSWER), tokenizer.special.eos], tokenizer.vocab_size, delay_seconds=0.002)
    (model.poison,) = tokenizer.encode(POISON)
    KINDS[kind][0](model, patch)
    with live(model=model) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_guilty_one_fails(
    live: Any, tokenizer: Tokenizer, record: Callable[..., None], monkeypatch: Patch, kind: str, stream: bool
) -> None:
    wrong = list[str]()

    def ask(path: str, body: dict[str, Any]) -> httpx.Response | None:
        with contextlib.suppress(httpx.RemoteProtocolError):
            return httpx.post(f"{server.url}{path}", json=body, timeout=30)

    with fragile(live, tokenizer, kind, monkeypatch) as server, ThreadPoolExecutor(GOOD + 1) as pool:
        for _ in range(REPEATS):
            others = [pool.submit(ask, CHAT, chat()) for _ in range(GOOD)]
            while server.metric("octavo_running") < 1 and not others[0].done():
                time.sleep(0.002)
            bad = pool.submit(ask, *guilty(kind, stream)).result()
            if not failed_in_order(bad):
                wrong.append(f"{kind}: {bad and bad.status_code} {bad and bad.text[-300:]}")
            for other in others:
                good = other.result()
                if good is None or good.status_code != 200 or good.json()["choices"][0]["message"]["content"] != ANSWER:
                    wrong.append(f"{kind}: another request got {good and good.status_code} {good and good.text[:200]}")
        server.settled()
        if kind != "the scores" and server.metric("octavo_engines_total") != 1:
            wrong.append(f"{kind}: the engine was replaced")
        until = time.monotonic() + 10
        while left := {
            name: n for name in ("running", "waiting", "slots_held") if (n := server.metric(f"octavo_{name}"))
        }:
            if time.monotonic() > until:
                wrong.append(f"{kind}: at the end {left}")
                break
    record("S10", REPEATS, wrong, kind=kind, stream=stream)


def test_an_engine_that_fails_is_replaced(live: Any, record: Callable[..., None], monkeypatch: Patch) -> None:
    """What cannot be laid to one request ends those that are in it; the next finds a new engine."""
    step, broken, wrong = Engine.step, threading.Event(), list[str]()

    def fragile_step(engine: Engine) -> Any:
        if broken.is_set():
            raise RuntimeError("the engine itself")
        return step(engine)

    monkeypatch.setattr(Engine, "step", fragile_step)
    n = 6 * SCALE
    with live(ANSWER) as server:
        for number in range(n):
            broken.set()
            if server.post(stream=number % 2 == 0).status_code != 500:
                wrong.append(f"trial {number}: no 500")
            broken.clear()
            if server.post().json()["choices"][0]["message"]["content"] != ANSWER:
                wrong.append(f"trial {number}: the next engine answers otherwise")
        assert server.metric("octavo_engines_total") == n + 1
    record("S10", n, wrong, kind="the engine")


def ready(server: Live) -> int:
    assert httpx.get(f"{server.url}/livez").status_code == 200
    return httpx.get(f"{server.url}/readyz").status_code


def becomes(server: Live, status: int) -> bool:
    until = time.monotonic() + 20
    while ready(server) != status:
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_ready_goes_and_comes_back(live: Any, record: Callable[..., None], monkeypatch: Patch) -> None:
    monkeypatch.setattr("octavo.serve.worker.RETRY_SECONDS", 0.05)
    wrong, n = list[str](), 3 * SCALE
    with live(ANSWER) as server:
        for number in range(n):
            server.model.fail_after = 0
            seen = [(server.post().status_code, ready(server)) for _ in range(3)]
            if seen != [(500, 200), (500, 200), (500, 503)]:
                wrong.append(f"trial {number}: {seen}")
            server.model.fail_after = None
            if not becomes(server, 200):
                wrong.append(f"trial {number}: it does not come back by itself")
    record("S10", n, wrong, kind="ready")


def test_a_step_that_does_not_end_is_seen(live: Any, record: Callable[..., None], monkeypatch: Patch) -> None:
    monkeypatch.setattr("octavo.serve.worker.STUCK_SECONDS", 0.1)
    step, free, wrong, n = Engine.step, threading.Event(), list[str](), 3 * SCALE
    free.set()

    def waiting(engine: Engine) -> Any:
        assert free.wait(30)
        return step(engine)

    monkeypatch.setattr(Engine, "step", waiting)
    with live(ANSWER) as server, ThreadPoolExecutor(1) as pool:
        for number in range(n):
            free.clear()
            answer = pool.submit(server.post)
            wrong += [] if becomes(server, 503) else [f"trial {number}: nobody sees it"]
            free.set()
            wrong += [] if answer.result().status_code == 200 and becomes(server, 200) else [f"trial {number}: lost"]
    record("S10", n, wrong, kind="stuck")
