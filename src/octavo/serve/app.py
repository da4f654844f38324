"""The web application: routes, preparation of a request, whole and streamed answers."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from octavo.errors import OctavoError
from octavo.infer.engine import Engine
from octavo.infer.generate import encode_prompt
from octavo.infer.request import EngineConfig, Request
from octavo.infer.sampling import SamplingConfig
from octavo.serve import protocol
from octavo.serve.body import Bodies, parse_object
from octavo.serve.guard import Guard, Message, Receive, Scope, Send
from octavo.serve.protocol import ChatRequest, CompletionRequest, Shape
from octavo.serve.refusal import ApiError
from octavo.serve.settings import ServeConfig
from octavo.serve.worker import Job, Worker
from octavo.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 4096
COMPLETION_MAX_TOKENS = 16
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/chat.css": ("chat.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
PUBLIC = frozenset(("/livez", *PAGE))

LookUp = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]

log = logging.getLogger("octavo.serve")


@dataclass(frozen=True)
class Plan:
    """A request that is known to be possible."""

    requests: list[Request]
    stream: bool
    usage_in_stream: bool
    n_top: int | None
    echo: list[str]

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompts; several answers share one."""
        return sum(len(request.prompt) for request in self.requests)


class Service:
    """Everything a request needs: the model's name and limits, the tokenizer and the worker."""

    def __init__(self, model: Any, tokenizer: Tokenizer, name: str, config: ServeConfig, look_up: LookUp | None = None):
        self.model, self.tokenizer, self.name, self.config = model, tokenizer, name, config
        self.look_up = look_up
        engine = EngineConfig(max_sequences=config.max_sequences, max_tokens=config.max_tokens)
        self.worker = Worker(lambda: Engine(model, tokenizer, engine), config.max_requests)
        self.bodies = Bodies(config.body_seconds)

    async def answer(self, request: HttpRequest, *, chat: bool) -> Response:
        """Read, admit, prepare, decode; the place in the queue is given back when the answer is out."""
        request_id = secrets.token_hex(12)
        body = await self.bodies.read(request)
        job = self.worker.admit(request_id)
        watcher = asyncio.create_task(_stop_when_gone(request.receive, job))
        handed_over = False
        try:
            plan = await asyncio.to_thread(self.prepare, body, chat)
            shape = Shape(request_id, self.name, chat=chat)
            job.start(plan.requests)
            if not plan.stream:
                return JSONResponse(await self._whole(job, plan, shape))
            events = self._events(job, plan, shape)
            first = await anext(events)  # what fails before the first token still gets its own status
            handed_over = True
            return EventStream(first, events, job, watcher, self.config.stall_seconds)
        finally:
            if not handed_over:
                watcher.cancel()
                job.close()

    def prepare(self, body: bytes, chat: bool) -> Plan:
        """Parse, validate and encode a request; runs off the event loop.

        Raises:
            ApiError: whatever is wrong with it.
        """
        request = protocol.validate(ChatRequest if chat else CompletionRequest, parse_object(body))
        if request.model != self.name:
            raise ApiError(404, "There is no such model; see /v1/models.", param="model", code="model_not_found")
        if chat:
            prompts, echo = [self._conversation(request)], [""]
            asked = request.max_completion_tokens or request.max_tokens
            n_top = request.top_logprobs if request.logprobs else None
            if request.top_logprobs and not request.logprobs:
                raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs", code="invalid_value")
        else:
            prompts, n_top = self._prompts(request.prompt), None
            echo = [self.tokenizer.decode(ids) if request.echo else "" for ids in prompts]
            asked = request.max_tokens or COMPLETION_MAX_TOKENS
        if len(prompts) * request.n > protocol.MAX_ROWS:
            raise ApiError(
                400, f"At most {protocol.MAX_ROWS} completions in one request.", param="n", code="invalid_value"
            )
        room = self._room(max(map(len, prompts)), asked, "messages" if chat else "prompt")
        config = self._sampling(request, min(asked or DEFAULT_MAX_TOKENS, room))
        settings = {"n": request.n, "stop_ids": frozenset(self.tokenizer.stop_ids), "n_top": n_top}
        return Plan(
            requests=[
                Request(ids, config, first_stream=i * request.n, **settings)  # type: ignore[arg-type]
                for i, ids in enumerate(prompts)
            ],
            stream=request.stream,
            usage_in_stream=request.stream_options.include_usage,
            n_top=n_top,
            echo=[text for text in echo for _ in range(request.n)],
        )

    def _conversation(self, request: ChatRequest) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise ApiError(
                400, "This model has no chat template; use /v1/completions.", param="messages", code="no_chat_template"
            )
        messages = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.content}
            for message in request.messages
        ]
        if self.look_up is not None:
            messages = self.look_up(messages)
        try:
            return list(self.tokenizer.render(messages, add_generation_prompt=True).ids)
        except OctavoError as error:
            raise ApiError(
                400, f"The model's chat template refuses this: {error.what[:300]}.", param="messages", code="template"
            ) from None

    def _prompts(self, prompt: Sequence[Any]) -> list[list[int]]:
        listed = [prompt] if prompt and isinstance(prompt[0], int) else prompt
        if len(listed) > protocol.MAX_ROWS:
            raise ApiError(400, f"At most {protocol.MAX_ROWS} prompts.", param="prompt", code="invalid_value")
        encoded = [encode_prompt(self.tokenizer, p) if isinstance(p, str) else list(p) for p in listed]
        for ids in encoded or [[]]:
            if not ids:
                raise ApiError(400, "The prompt has no tokens.", param="prompt", code="invalid_value")
            if not 0 <= min(ids) <= max(ids) < self.tokenizer.vocab_size:
                raise ApiError(
                    400,
                    f"Token ids are 0 to {self.tokenizer.vocab_size - 1}.",
                    param="prompt",
                    code="invalid_value",
                )
        return encoded

    def _room(self, n_prompt: int, asked: int | None, param: str) -> int:
        limit = self.model.max_seq_len
        if n_prompt + (asked or 1) > limit:
            raise ApiError(
                400,
                f"This model's context is {limit} tokens. The prompt has {n_prompt} tokens"
                + (f" and {asked} more were asked for." if asked else ", which leaves no room for an answer."),
                param=param,
                code="context_length_exceeded",
            )
        return limit - n_prompt

    def _sampling(self, request: Any, max_new_tokens: int) -> SamplingConfig:
        bias: dict[int, float] = {}
        for token, value in request.logit_bias.items():
            if not (token.isascii() and token.isdecimal() and len(token) < 12 and int(token) < self.model.vocab_size):
                raise ApiError(
                    400,
                    f"logit_bias: token ids are 0 to {self.model.vocab_size - 1}.",
                    param="logit_bias",
                    code="invalid_value",
                )
            bias[int(token)] = value
        names = "temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty".split()
        return SamplingConfig(
            **{name: getattr(request, name) for name in names},
            logit_bias=bias,
            seed=None if request.seed is None else request.seed % 2**63,
            max_new_tokens=max_new_tokens,
            stop=tuple(request.stop),
        )

    async def _whole(self, job: Job, plan: Plan, shape: Shape) -> dict[str, Any]:
        rows = range(len(plan.echo))
        texts, scores, reasons, n_new = [[text] for text in plan.echo], [[] for _ in rows], ["" for _ in rows], 0
        async for piece in job.pieces():
            n_new += 1
            texts[piece.row].append(piece.text)
            reasons[piece.row] = piece.finish_reason or ""
            if piece.score is not None:
                scores[piece.row].append(piece.score)
        if not all(reasons):  # the job was stopped: its client has gone
            raise ApiError(499, "The client has closed the request.", code="cancelled")
        choices = [
            {
                "text": "".join(texts[row]),
                "finish_reason": reasons[row],
                "logprobs": protocol.choice_scores(self.tokenizer, scores[row]) if plan.n_top is not None else None,
            }
            for row in rows
        ]
        return shape.whole(choices, protocol.usage(plan.n_prompt, n_new))

    async def _events(self, job: Job, plan: Plan, shape: Shape) -> AsyncIterator[bytes]:
        """The body of a stream, one event at a time; the first comes when there is something to say."""
        begun: set[int] = set()
        n_new = 0
        try:
            async for piece in job.pieces():
                n_new += 1
                row, text = piece.row, piece.text
                if row not in begun:
                    text = plan.echo[row] + text
                scores = protocol.choice_scores(self.tokenizer, [piece.score]) if piece.score is not None else None
                if text or scores or row not in begun:
                    yield protocol.event(shape.chunk(row, text, first=row not in begun, logprobs=scores))
                begun.add(row)
                if piece.finish_reason:
                    yield protocol.event(shape.chunk(row, None, finish_reason=piece.finish_reason))
        except ApiError as error:
            if not begun:
                raise
            for row in begun:
                yield protocol.event(shape.chunk(row, None, finish_reason="error"))
            yield protocol.event(error.body)
        else:
            if plan.usage_in_stream:
                yield protocol.event(shape.usage_chunk(protocol.usage(plan.n_prompt, n_new)))
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
        finally:
            self.watcher.cancel()
            self.job.close()

    async def _send(self, send: Send, event: bytes) -> None:
        message: Message = {"type": "http.response.body", "body": event, "more_body": True}
        await asyncio.wait_for(send(message), self.stall_seconds)


async def _stop_when_gone(receive: Callable[[], Awaitable[Any]], job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.stop()


def create_app(
    model: Any, tokenizer: Tokenizer, name: str, config: ServeConfig | None = None, look_up: LookUp | None = None
) -> FastAPI:
    """The application for one model; its worker thread runs between the lifespan's start and end.

    Args:
        model: a predictor, ready to be called.
        name: what clients write as ``model``.
        look_up: changes the messages of a chat before the model reads them, such as by putting in what was found.
    """
    config = config or ServeConfig()
    service = Service(model, tokenizer, name, config, look_up)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.worker.close)

    app = FastAPI(title="Octavo", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.worker = service.worker
    app.add_middleware(
        Guard, hosts=frozenset(config.allow_hosts) | {config.host}, api_key=config.api_key, public=PUBLIC
    )
    _add_errors(app)
    _add_page(app)

    @app.get("/livez")
    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> Response:
        reason = service.worker.not_ready()
        return JSONResponse({"status": reason or "ready"}, 503 if reason else 200)

    entry = {"id": name, "object": "model", "created": 0, "owned_by": "octavo", "max_model_len": model.max_seq_len}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> dict[str, Any]:
        if model_id != name:
            raise ApiError(404, "There is no such model; see /v1/models.", param="model", code="model_not_found")
        return entry

    @app.post("/v1/chat/completions", openapi_extra=_described(ChatRequest))
    async def chat_completions(request: HttpRequest) -> Response:
        return await service.answer(request, chat=True)

    @app.post("/v1/completions", openapi_extra=_described(CompletionRequest))
    async def completions(request: HttpRequest) -> Response:
        return await service.answer(request, chat=False)

    return app


def _described(kind: type[Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


def _add_errors(app: FastAPI) -> None:
    async def refused(_: HttpRequest, error: ApiError) -> Response:
        return error.response()

    async def http(_: HttpRequest, error: HTTPException) -> Response:
        message = {404: "There is nothing at this address.", 405: "This address does not take this method."}
        api = ApiError(error.status_code, message.get(error.status_code, "Refused."), headers=error.headers)
        return api.response()

    async def failed(_: HttpRequest, error: Exception) -> Response:
        return ApiError(500, "The server failed on this request; see its log.", code="internal").response()

    app.add_exception_handler(ApiError, refused)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, failed)


def _add_page(app: FastAPI) -> None:
    folder = resources.files("octavo.serve") / "page"

    def serve_file(path: str, content: bytes, media_type: str) -> None:
        @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
        async def page() -> Response:
            return Response(content, media_type=media_type)

    for path, (file, media_type) in PAGE.items():
        serve_file(path, (folder / file).read_bytes(), media_type)
