"""The web application: its routes, and the way of a request through them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from octavo import __version__
from octavo.serve import protocol
from octavo.serve.answers import Answer, EventStream, stop_when_gone
from octavo.serve.body import Bodies, parse_object
from octavo.serve.embeddings import EmbeddingRequest
from octavo.serve.guard import Guard, Message, Receive, Scope, Send
from octavo.serve.metrics import CONTENT_TYPE, OTHER, Labels, Metrics
from octavo.serve.protocol import ChatRequest, CompletionRequest
from octavo.serve.refusal import ApiError
from octavo.serve.responses import ResponseRequest, refuse_stored
from octavo.serve.service import Asked, LookUp, Service
from octavo.serve.settings import ServeConfig
from octavo.serve.worker import TOTALS, Gate
from octavo.tokenizer import Tokenizer

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/saved.js": ("saved.js", "text/javascript; charset=utf-8"),
    "/talk.js": ("talk.js", "text/javascript; charset=utf-8"),
    "/words.js": ("words.js", "text/javascript; charset=utf-8"),
    "/chat.css": ("chat.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
PUBLIC = frozenset(("/livez", *PAGE))
ENDPOINTS: dict[str, type[Asked]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/responses": ResponseRequest,
}

_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR = {"message": {"type": "string"}, "type": {"type": "string"}, "param": _TEXT, "code": _TEXT}
_OBJECT = {"type": "object", "properties": _ERROR, "required": [*_ERROR], "additionalProperties": False}
REFUSED: dict[int | str, dict[str, Any]] = {
    status: {
        "description": "Refused: what is wrong, and the field that is.",
        "content": {
            "application/json": {
                "schema": {"type": "object", "properties": {"error": _OBJECT}, "required": ["error"]},
            }
        },
    }
    for status in ("4XX", "5XX")
}


class Desk:
    """Takes requests in, hands each to the model it names, and the answer out."""

    def __init__(self, services: Iterable[Service], config: ServeConfig, metrics: Metrics):
        self.services = {service.name: service for service in services}
        self.config, self.metrics = config, metrics
        self.gate = Gate(config.max_requests, metrics)
        self.bodies = Bodies(config.body_seconds)

    async def answer(self, request: HttpRequest, kind: type[Asked]) -> Response:
        """Read, admit, prepare, decode; the place in the queue is given back when the answer is out."""
        request_id = secrets.token_hex(12)
        body = await self.bodies.read(request)
        job = self.gate.admit(request_id)
        watcher = asyncio.create_task(stop_when_gone(request.receive, job))
        handed_over = False
        try:
            answer = await asyncio.to_thread(self._prepare, body, kind, request_id)
            answer.start(job)
            if not answer.stream:
                return JSONResponse(await answer.whole(job))
            events = answer.events(job)
            try:
                first = await anext(events)  # what fails before the first token still gets its own status
            except StopAsyncIteration:
                raise ApiError(499, "The client has closed the request.", code="cancelled") from None
            handed_over = True
            return EventStream(first, events, job, watcher, self.config.stall_seconds)
        finally:
            if not handed_over:
                watcher.cancel()
                job.close()

    def find(self, name: str) -> Service:
        """The model of this name.

        Raises:
            ApiError: 404 if there is none.
        """
        service = self.services.get(name)
        self.metrics.add("octavo_model_requests_total", model=name if service else OTHER)
        if service is None:
            raise ApiError(404, "There is no such model; see /v1/models.", param="model", code="model_not_found")
        return service

    def _prepare(self, body: bytes, kind: type[Asked], request_id: str) -> Answer:
        parsed = parse_object(body)
        if kind is ResponseRequest:
            refuse_stored(parsed)
        asked: Asked = protocol.validate(kind, parsed)
        return self.find(asked.model).prepare(asked, request_id)

    def not_ready(self) -> str | None:
        """Why no work should be sent here now; None if all is well."""
        if self.gate.draining:
            return "shutting down"
        reasons = {name: service.worker.not_ready() for name, service in self.services.items()}
        if len(reasons) == 1:
            return next(iter(reasons.values()))
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason) or None

    def entry(self, service: Service) -> dict[str, Any]:
        """What /v1/models says of a model."""
        head = {"id": service.name, "object": "model", "created": 0, "owned_by": "octavo"}
        return {**head, "max_model_len": service.model.max_seq_len, "tasks": service.tasks}

    def figures(self) -> Iterable[tuple[str, Labels, float]]:
        """What holds now, for /metrics."""
        yield "octavo_requests_open", {}, len(self.gate.open_jobs)
        yield "octavo_requests_limit", {}, self.gate.max_jobs
        for name, service in self.services.items():
            model, found = {"model": name}, service.worker.figures()
            yield "octavo_ready", model, not (self.gate.draining or service.worker.not_ready())
            for figure in ("running", "waiting", "slots_held"):
                yield f"octavo_{figure}", model, found.get(figure, 0)
            held, idle = found.get("blocks_held", 0), found.get("blocks_idle", 0)
            for state, n in (("held", held), ("idle", idle), ("free", found.get("blocks", 0) - held - idle)):
                yield "octavo_blocks", {**model, "state": state}, n
            for figure, family in TOTALS.items():
                yield family, model, found[figure]


def create_app(
    model: Any, tokenizer: Tokenizer, name: str, config: ServeConfig | None = None, look_up: LookUp | None = None
) -> FastAPI:
    """The application for one model, which continues texts; ``serve_all`` says more.

    Args:
        model: a predictor, ready to be called.
        name: what clients write as ``model``.
        look_up: changes the messages of a chat before the model reads them, such as by putting in what was found.
    """
    config, metrics = config or ServeConfig(), Metrics()
    return serve_all([Service(model, tokenizer, name, config, look_up, metrics=metrics)], config, metrics)


def serve_all(services: Sequence[Service], config: ServeConfig, metrics: Metrics) -> FastAPI:
    """The application for several models; their worker threads run between the lifespan's start and end.

    Args:
        metrics: what the services count with.
    """
    desk = Desk(services, config, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for service in services:
            service.worker.start()
        try:
            yield
        finally:
            desk.gate.stop_all()
            for service in services:
                await asyncio.to_thread(service.worker.close)

    app = FastAPI(title="Octavo", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.gate = desk.gate
    app.add_middleware(
        Guard, hosts=frozenset(config.allow_hosts) | {config.host}, api_keys=config.api_keys, public=PUBLIC
    )
    _add_errors(app)
    _add_page(app)

    @app.get("/livez")
    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", responses={503: {"description": "Not ready; the body says why."}})
    async def readyz() -> Response:
        reason = desk.not_ready()
        return JSONResponse({"status": reason or "ready"}, 503 if reason else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def all_metrics() -> Response:
        return Response(metrics.text(desk.figures()), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [desk.entry(service) for service in services]}

    @app.get("/v1/models/{model_id:path}", responses=REFUSED)
    async def one_model(model_id: str) -> dict[str, Any]:
        return desk.entry(desk.find(model_id))

    def add_endpoint(path: str, kind: type[Asked]) -> None:
        kinds = {"application/json": {}} | ({} if kind is EmbeddingRequest else {"text/event-stream": {}})

        @app.post(path, name=path.rpartition("/")[2], responses={200: {"content": kinds}, **REFUSED})
        async def endpoint(request: HttpRequest) -> Response:
            return await desk.answer(request, kind)

    for path, kind in ENDPOINTS.items():
        add_endpoint(path, kind)
    _describe(app)
    app.add_middleware(_Counted, metrics=metrics, routes=frozenset(route.path for route in app.routes))  # type: ignore[attr-defined]
    return app


class _Counted:
    """ASGI middleware around all others: every answer by its route and status."""

    def __init__(self, app: Any, metrics: Metrics, routes: frozenset[str]):
        self.app, self.metrics, self.routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"]
                route = "/v1/models/{model_id:path}" if path.startswith("/v1/models/") else path
                label = route if route in self.routes else OTHER
                self.metrics.add("octavo_requests_total", route=label, status=str(message["status"]))
            await send(message)

        await self.app(scope, receive, send_counted if scope["type"] == "http" else send)


def _describe(app: FastAPI) -> None:
    """/openapi.json: the bodies, which the routes read themselves, and the one form of a refusal."""
    where = "#/components/schemas/{model}"
    bodies, found = models_json_schema([(kind, "validation") for kind in ENDPOINTS.values()], ref_template=where)
    for route in app.routes:
        if isinstance(route, APIRoute) and (kind := ENDPOINTS.get(route.path)):
            content = {"application/json": {"schema": bodies[kind, "validation"]}}
            route.openapi_extra = {"requestBody": {"required": True, "content": content}}
    document = get_openapi(title="Octavo", version=__version__, routes=app.routes)
    document.setdefault("components", {}).setdefault("schemas", {}).update(found["$defs"])
    app.openapi = lambda: document


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
