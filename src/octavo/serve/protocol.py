"""What clients may send and what they get back: the OpenAI completion and chat formats, without the web parts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from octavo.errors import did_you_mean
from octavo.serve.refusal import ApiError, param_name

if TYPE_CHECKING:
    from octavo.infer.text import TokenScore
    from octavo.tokenizer import Tokenizer

MAX_ROWS = 8
MAX_MESSAGES = 2048
MAX_STOP = 4

# Fields that clients send and that change nothing about the text of an answer.
WITHOUT_EFFECT = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key parallel_tool_calls".split()
)
TEMPLATES = frozenset(("chat_template", "chat_template_kwargs"))


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    """The text of a message: a string, or a list of text parts joined."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("only parts of type `text` are read")
        texts.append(part["text"])
    return "".join(texts)


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text)]
    name: str | None = None


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(_Strict):
    type: Literal["text"]


class _Request(_Strict):
    model: str
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, lt=2**31)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict, max_length=1024)
    n: int = Field(default=1, ge=1, le=MAX_ROWS)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Annotated[str, StringConstraints(min_length=1, max_length=256)]], BeforeValidator(_listed)] = (
        Field(default_factory=list, max_length=MAX_STOP)
    )
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class ChatRequest(_Request):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    response_format: ResponseFormat | None = None


class CompletionRequest(_Request):
    """POST /v1/completions"""

    prompt: Annotated[list[str] | list[int] | list[list[int]], BeforeValidator(_listed)]
    echo: bool = False


def validate(kind: type[_Request], body: Mapping[str, Any]) -> Any:
    """The request as ``kind``; null means not given, as it does in the OpenAI interface.

    Raises:
        ApiError: 400 with the first wrong field in ``param``.
    """
    given = {key: value for key, value in body.items() if value is not None and key not in WITHOUT_EFFECT}
    for key in given:
        if key in TEMPLATES:
            raise ApiError(400, "A request cannot bring its own template.", param=key, code="unsupported_parameter")
        if key not in kind.model_fields:
            hint = f" {did_you_mean(key, kind.model_fields).capitalize()}" if len(key) < 40 else ""
            name = param_name([key])
            raise ApiError(
                400,
                f"Parameter {name} is not supported.{hint}" if name else "A parameter is not supported.",
                param=name,
                code="unsupported_parameter",
            )
    if isinstance(given.get("messages"), list):
        given["messages"] = [_without_nothing(message) for message in given["messages"][: MAX_MESSAGES + 1]]
    try:
        return kind.model_validate(given)
    except ValidationError as invalid:
        error = invalid.errors(include_input=False, include_url=False)[0]
        missing = error["type"] == "missing"
        path = [part for part in error["loc"] if not (isinstance(part, str) and "[" in part)]
        message = "This field is required." if missing else f"{error['msg']}."
        name = param_name(path)
        raise ApiError(
            400,
            f"{name}: {message}" if name else message,
            param=name,
            code="missing_required_parameter" if missing else "invalid_value",
        ) from None


def _without_nothing(message: Any) -> Any:
    """A message as a client sends an earlier answer back: empty lists and nulls stand for fields it does not use."""
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None and (value != [] or key == "content")}


def choice_scores(tokenizer: Tokenizer, scores: Iterable[TokenScore]) -> dict[str, Any]:
    """``logprobs`` of a chat choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {
            "token": raw.decode("utf-8", errors="replace"),
            "logprob": max(logprob, -9999.0),  # JSON has no -inf
            "bytes": list(raw),
        }

    return {
        "content": [
            {**entry(score.id, score.logprob), "top_logprobs": [entry(*best) for best in score.top]} for score in scores
        ],
        "refusal": None,
    }


class Shape:
    """The JSON of one answer, chat or completion, whole or in chunks."""

    def __init__(self, request_id: str, model: str, *, chat: bool):
        self.chat = chat
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int]) -> dict[str, Any]:
        """``choices`` have text, finish_reason and logprobs, in the order of their index."""
        listed = []
        for index, choice in enumerate(choices):
            content = (
                {"message": {"role": "assistant", "content": choice["text"]}} if self.chat else {"text": choice["text"]}
            )
            rest = {"logprobs": choice["logprobs"], "finish_reason": choice["finish_reason"]}
            listed.append({"index": index, **content, **rest})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": listed, "usage": usage}

    def chunk(
        self,
        index: int,
        text: str | None,
        *,
        first: bool = False,
        finish_reason: str | None = None,
        logprobs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A part of choice ``index``."""
        if self.chat:
            delta = ({"role": "assistant"} if first else {}) | ({} if text is None else {"content": text})
            content: dict[str, Any] = {"delta": delta}
        else:
            content = {"text": text or ""}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self.head, "object": self._chunk_kind, "choices": [choice]}

    def usage_chunk(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The last chunk of a stream that asked for its usage."""
        return {**self.head, "object": self._chunk_kind, "choices": [], "usage": usage}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"


def usage(n_prompt: int, n_completion: int) -> dict[str, int]:
    """Token counts of one request."""
    return {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "total_tokens": n_prompt + n_completion}


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
