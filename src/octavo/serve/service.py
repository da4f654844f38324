"""One model as the server sees it: what it can do, and how a request for it is made ready."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from octavo.errors import OctavoError
from octavo.infer.engine import Engine
from octavo.infer.generate import encode_prompt
from octavo.infer.request import EngineConfig, Request
from octavo.infer.sampling import SamplingConfig
from octavo.serve import protocol, tools
from octavo.serve.answers import Answer, Decoded, Plan
from octavo.serve.embeddings import Embedded, EmbeddingRequest, Vectors
from octavo.serve.metrics import Meter, Metrics
from octavo.serve.protocol import ChatRequest, CompletionRequest, Shape
from octavo.serve.refusal import ApiError
from octavo.serve.responses import Response, ResponseRequest
from octavo.serve.settings import ServeConfig
from octavo.serve.worker import Worker
from octavo.tokenizer import Tokenizer

if TYPE_CHECKING:
    from octavo.infer.constraints import Grammar

DEFAULT_MAX_TOKENS = 4096
COMPLETION_MAX_TOKENS = 16

LONG_CHARACTERS = 1 << 16
"""From here on it is asked whether a text can fit at all before its tokens are made, which takes long."""

LookUp = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
Asked = ChatRequest | CompletionRequest | ResponseRequest | EmbeddingRequest


class Service:
    """A model, its name, limits and tokenizer, and the worker that decodes for it.

    Args:
        model: a predictor, ready to be called.
        name: what clients write as ``model``.
        look_up: changes the messages of a chat before the model reads them, such as by putting in what was found.
        drafter: makes what guesses ahead, once for each engine.
        decodes: whether it continues texts; an encoder does not.
        vectors: how it makes vectors of texts; None if it makes none.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        name: str,
        config: ServeConfig,
        look_up: LookUp | None = None,
        *,
        drafter: Callable[[], Any] | None = None,
        decodes: bool = True,
        vectors: Vectors | None = None,
        metrics: Metrics | None = None,
    ):
        self.model, self.tokenizer, self.name, self.config = model, tokenizer, name, config
        self.look_up, self.vectors = look_up, vectors
        shared = {name: getattr(config, name) for name in ("max_sequences", "max_tokens", "deterministic")}
        engine = EngineConfig(**shared)

        def make() -> Engine:
            return Engine(model, tokenizer, engine, drafter=drafter() if drafter else None)

        self.worker = Worker(make if decodes else None, Meter(metrics or Metrics(), name))

    @property
    def tasks(self) -> list[str]:
        """What may be asked of it: chat, completions, embeddings."""
        able = {
            "chat": self.worker.make is not None and self.tokenizer.chat_template is not None,
            "completions": self.worker.make is not None,
            "embeddings": self.vectors is not None,
        }
        return [task for task, is_able in able.items() if is_able]

    def prepare(self, request: Asked, request_id: str) -> Answer:
        """Check and encode a request; runs off the event loop.

        Raises:
            ApiError: whatever is wrong with it.
        """
        if isinstance(request, EmbeddingRequest):
            return self._embedding(request)
        if self.worker.make is None:
            raise ApiError(400, "This model reads texts and writes none; use /v1/embeddings.", param="model")
        if isinstance(request, ResponseRequest):
            names = ("model", "temperature", "top_p", "top_logprobs")
            chat = {name: getattr(request, name) for name in names} | {"messages": request.messages()}
            chat |= {"max_tokens": request.max_output_tokens, "logprobs": request.top_logprobs > 0}
            decoded = self._chat(protocol.validate(ChatRequest, chat))
            return Response(decoded, request, request_id, self.name)
        is_chat = isinstance(request, ChatRequest)
        return Plan(
            decoded=self._chat(request) if is_chat else self._completion(request),
            shape=Shape(request_id, self.name, chat=is_chat),
            stream=request.stream,
            usage_in_stream=request.stream_options.include_usage,
        )

    def _embedding(self, request: EmbeddingRequest) -> Embedded:
        vectors = self.vectors
        if vectors is None:
            raise ApiError(400, "This model makes no vectors.", param="model", code="no_embeddings")
        if request.dimensions not in (None, vectors.width):
            message = f"The vectors of this model have {vectors.width} dimensions."
            raise ApiError(400, message, param="dimensions", code="invalid_value")
        self._refuse_huge([text for text in request.input if isinstance(text, str)], "input")
        texts = vectors.encoded(request.input)
        return Embedded(self.worker, vectors, texts, self.name, request.encoding_format == "base64")

    def _chat(self, request: ChatRequest) -> Decoded:
        if request.top_logprobs and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs", code="invalid_value")
        asked = request.max_completion_tokens or request.max_tokens
        n_top = request.top_logprobs if request.logprobs else None
        offered = tools.offered(request, self.tokenizer)
        grammar = tools.grammar_of(request, offered, self.tokenizer)
        prompts = [self._conversation(request, offered)]
        decoded = self._decoded(request, prompts, asked, n_top, [""], "messages", grammar)
        return replace(decoded, tools=frozenset(tool["function"]["name"] for tool in offered))

    def _completion(self, request: CompletionRequest, n_top: int | None = None) -> Decoded:
        if request.best_of is not None:
            if request.stream or request.best_of < request.n:
                message = "best_of is at least n, and nothing can be streamed before the best is known."
                raise ApiError(400, message, param="best_of", code="invalid_value")
            if request.best_of > request.n:
                drawn = request.model_copy(update={"n": request.best_of, "best_of": None})
                return replace(self._completion(drawn, n_top=0), n_best=request.n, n_top=None)
        prompts = self._prompts(request.prompt)
        echo = [self.tokenizer.decode(ids) if request.echo else "" for ids in prompts]
        return self._decoded(request, prompts, request.max_tokens or COMPLETION_MAX_TOKENS, n_top, echo, "prompt")

    def _decoded(
        self,
        request: Any,
        prompts: list[list[int]],
        asked: int | None,
        n_top: int | None,
        echo: list[str],
        param: str,
        grammar: Grammar | None = None,
    ) -> Decoded:
        if len(prompts) * request.n > protocol.MAX_ROWS:
            message = f"At most {protocol.MAX_ROWS} completions in one request."
            raise ApiError(400, message, param="n", code="invalid_value")
        room = self._room(max(map(len, prompts)), asked, param)
        config = self._sampling(request, min(asked or DEFAULT_MAX_TOKENS, room))
        requests = [
            Request(
                ids, config, n=request.n, stop_ids=frozenset(self.tokenizer.stop_ids), n_top=n_top,
                priority=request.priority, first_stream=i * request.n, constraint=grammar,
            )
            for i, ids in enumerate(prompts)
        ]  # fmt: skip
        return Decoded(
            self.worker, self.tokenizer, requests, n_top, echo=[text for text in echo for _ in range(request.n)]
        )

    def _conversation(self, request: ChatRequest, offered: list[dict[str, Any]]) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise ApiError(
                400, "This model has no chat template; use /v1/completions.", param="messages", code="no_chat_template"
            )
        self._refuse_huge(["".join(message.content or "" for message in request.messages)], "messages")
        messages = tools.conversation(request.messages)
        if self.look_up is not None:
            messages = self.look_up(messages)
        try:
            return list(self.tokenizer.render(messages, add_generation_prompt=True, tools=offered or None).ids)
        except OctavoError as error:
            raise ApiError(
                400, f"The model's chat template refuses this: {error.what[:300]}.", param="messages", code="template"
            ) from None

    def _prompts(self, prompt: Sequence[Any]) -> list[list[int]]:
        listed = [prompt] if prompt and isinstance(prompt[0], int) else prompt
        if len(listed) > protocol.MAX_ROWS:
            raise ApiError(400, f"At most {protocol.MAX_ROWS} prompts.", param="prompt", code="invalid_value")
        self._refuse_huge([text for text in listed if isinstance(text, str)], "prompt")
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

    def _refuse_huge(self, texts: Iterable[str], param: str) -> None:
        n, limit = max(map(len, texts), default=0), self.model.max_seq_len
        if n > LONG_CHARACTERS and n > 4 * limit * self._longest_token:  # 4: what a normalizer may make shorter
            message = f"This model's context is {limit} tokens, and a text of {n} characters has more."
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    @cached_property
    def _longest_token(self) -> int:
        return max(len(self.tokenizer.token_bytes(token)) for token in range(self.tokenizer.vocab_size))

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
        if request.temperature_path == "geometric" and 0 in (request.temperature, request.temperature_end):
            message = "A geometric path of temperatures does not touch 0."
            raise ApiError(400, message, param="temperature_path", code="invalid_value")
        names = {*SamplingConfig.model_fields} - {"logit_bias", "seed", "max_new_tokens", "stop"}
        return SamplingConfig(
            **{name: getattr(request, name) for name in names},
            logit_bias=bias,
            seed=None if request.seed is None else request.seed % 2**63,
            max_new_tokens=max_new_tokens,
            stop=tuple(request.stop),
        )
