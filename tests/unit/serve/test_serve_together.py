"""Which of a text's tokens go out at once, and which together."""

from types import SimpleNamespace

import pytest

from octavo.infer.request import Request
from octavo.infer.text import Piece
from octavo.serve import worker
from octavo.serve.worker import TOGETHER_SECONDS, Worker


class Busy(Worker):
    _busy = True  # type: ignore[assignment]


class Work(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


class Loop:
    def __init__(self) -> None:
        self.got: list[list[str]] = []

    def call_soon_threadsafe(self, _: object, results: list) -> None:
        self.got.append(["end" if item is None else f"{job.id}{item.text}" for job, item in results])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr(worker.time, "monotonic", lambda: made.now)
    return made


def test_the_first_token_and_the_last_do_not_wait(clock: SimpleNamespace) -> None:
    loop, own = Loop(), Busy(None)
    requests = {}
    for name in "ab":
        job = Work(id=name, loop=loop, clock={}, began=clock.now, left=1, requests=(), ended=False)
        requests[name] = Request([0])
        own._owners[requests[name]] = (job, 0)

    def step(**said: str) -> list[list[str]]:
        before = len(loop.got)
        for name, text in said.items():
            reason = "stop" if text == "." else None
            own._pass_on(requests[name], Piece(0, 1, text, reason, None), clock.now)
        own._deliver()
        clock.now += 1.01 * TOGETHER_SECONDS / 4
        return loop.got[before:]

    assert step(a="1") == [["a1"]]
    assert step(a="2") == []
    assert step(a="3", b="1") == [["b1"]]  # a still waits
    assert step(a="4") == []
    assert step(a="5", b="2") == [["a2", "a3", "a4", "a5", "b2"]]  # in their order
    assert step(a="6", b="3") == []
    assert step(a=".", b="4") == [["a6", "a.", "end"]]
    own.__class__ = Worker  # nothing is left to decode: nothing waits
    assert step() == [["b3", "b4"]]
