"""Answers on their way out: whole or as a stream of events, and what happens when a client does not read."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi.responses import Response

from octavo.infer.generate import mean_log_prob
from octavo.infer.request import Request
from octavo.infer.text import TokenScore
from octavo.serve import protocol
from octavo.serve.guard import Message, Receive, Scope, Send
from octavo.serve.protocol import Shape
from octavo.serve.refusal import ApiError
from octavo.serve.tools import Call, Reading
from octavo.serve.worker import Job, Worker
from octavo.tokenizer import Tokenizer

log = logging.getLogger("octavo.serve")


class Answer(Protocol):
    """A request that is known to be possible, and the form of its answer."""

    @property
    def stream(self) -> bool: ...

    def start(self, job: Job) -> None:
        """Hand the work over."""
        ...

    async def whole(self, job: Job) -> dict[str, Any]:
        """The JSON of the answer."""
        ...

    def events(self, job: Job) -> AsyncIterator[bytes]:
        """The body of a stream, in parts; the first comes when there is something to say."""
        ...


@dataclass(frozen=True)
class Decoded:
    """Texts to be decoded, and the worker that does it.

    Args:
        tools: the functions that a text may call.
        n_best: of the texts of each request, how many are given: those of the highest mean log-probability.
    """

    worker: Worker
    tokenizer: Tokenizer
    requests: list[Request]
    n_top: int | None
    echo: list[str]
    tools: frozenset[str] = frozenset()
    n_best: int | None = None

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompts; several answers share one."""
        return sum(len(request.prompt) for request in self.requests)

    def start(self, job: Job) -> None:
        self.worker.meter.add("octavo_prompt_tokens_total", self.n_prompt)
        job.start(self.worker, self.requests)

    async def choices(self, job: Job) -> tuple[list[dict[str, Any]], int]:
        """Text, calls, finish_reason and logprobs of each, and how many tokens they are.

        Raises:
            ApiError: the model failed, or the client has left.
        """
        rows = range(len(self.echo))
        texts, scores, reasons, n_new = [[text] for text in self.echo], [[] for _ in rows], ["" for _ in rows], 0
        async for pieces in job.results():
            n_new += len(pieces)
            for piece in pieces:
                texts[piece.row].append(piece.text)
                reasons[piece.row] = piece.finish_reason or ""
                if piece.score is not None:
                    scores[piece.row].append(piece.score)
        if not all(reasons):  # the job was stopped: its client has gone
            raise ApiError(499, "The client has closed the request.", code="cancelled")
        choices = [
            {
                **self._read("".join(texts[row]), reasons[row]),
                "logprobs": protocol.choice_scores(self.tokenizer, scores[row]) if self.n_top is not None else None,
            }
            for row in self._given(scores)
        ]
        return choices, n_new

    def _read(self, text: str, reason: str) -> dict[str, Any]:
        if not self.tools:
            return {"text": text, "calls": [], "finish_reason": reason}
        reading = Reading(self.tools)
        text = reading.push(text)[0] + reading.flush()[0]
        return {"text": text, "calls": reading.calls, "finish_reason": reading.reason(reason)}

    def _given(self, scores: list[list[TokenScore]]) -> list[int]:
        """The texts that are given, by number."""
        if self.n_best is None:
            return list(range(len(scores)))
        means, given, first = [mean_log_prob([one.logprob for one in own]) for own in scores], list[int](), 0
        for request in self.requests:
            drawn = range(first, first := first + request.n)
            given += sorted(drawn, key=lambda row: -means[row])[: self.n_best]
        return given


@dataclass(frozen=True)
class Plan:
    """An answer of /v1/chat/completions or /v1/completions."""

    decoded: Decoded
    shape: Shape
    stream: bool
    usage_in_stream: bool

    def start(self, job: Job) -> None:
        self.decoded.start(job)

    async def whole(self, job: Job) -> dict[str, Any]:
        choices, n_new = await self.decoded.choices(job)
        return self.shape.whole(choices, protocol.usage(self.decoded.n_prompt, n_new))

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        begun: set[int] = set()
        shape, n_new = self.shape, 0
        readings = defaultdict[int, Reading](lambda: Reading(self.decoded.tools))
        try:
            async for pieces in job.results():
                parts = list[bytes]()
                for piece in pieces:
                    n_new += 1
                    row, text, score = piece.row, piece.text, piece.score
                    if row not in begun:
                        text = self.decoded.echo[row] + text
                    scores = protocol.choice_scores(self.decoded.tokenizer, [score]) if score is not None else None
                    reason, calls = piece.finish_reason, list[tuple[int, Call]]()
                    if self.decoded.tools:
                        text, calls = readings[row].numbered(text, ended=reason is not None)
                        reason = reason and readings[row].reason(reason)
                    first = row not in begun
                    if text or calls or scores or first:
                        chunk = shape.chunk(row, text, calls=calls, first=first, logprobs=scores)
                        parts.append(protocol.event(chunk))
                    begun.add(row)
                    if reason:
                        parts.append(protocol.event(shape.chunk(row, None, finish_reason=reason)))
                if parts:
                    yield b"".join(parts)
        except ApiError as error:
            if not begun:
                raise
            for row in begun:
                yield protocol.event(shape.chunk(row, None, finish_reason="error"))
            yield protocol.event(error.body)
        else:
            if self.usage_in_stream:
                yield protocol.event(shape.usage_chunk(protocol.usage(self.decoded.n_prompt, n_new)))
        yield protocol.DONE


class EventStream(Response):
    """A stream that gives its place back whatever happens, and drops a client that does not read."""

    def __init__(
        self,
        first: bytes,
        events: AsyncIterator[bytes],
        job: Job,
        watcher: asyncio.Task[None],
        stall_seconds: float,
    ):
        super().__init__(media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.first, self.events, self.job, self.watcher, self.stall_seconds = first, events, job, watcher, stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._send(send, self.first)
            async for event in self.events:
                await self._send(send, event)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.warning("request %s: its client read nothing for %g seconds", self.job.id, self.stall_seconds)
            self.job.give_up()
        finally:
            self.watcher.cancel()
            self.job.close()

    async def _send(self, send: Send, event: bytes) -> None:
        message: Message = {"type": "http.response.body", "body": event, "more_body": True}
        async with asyncio.timeout(self.stall_seconds):
            await send(message)


async def stop_when_gone(receive: Callable[[], Awaitable[Any]], job: Job) -> None:
    """Stop a job whose client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass
    job.give_up()
